"""Whether `memory_budget` is kept: random runs on a CPU, each in a process of its own, whose resident memory is read.

Usage: python benchmarks/memory_budget.py [--runs 30] [--seed 0]

A run draws its stage, architecture, sizes, full weights or adapters, the length of its rows and a budget between what
the planner says of the run as configured and what all settings together can save. It takes two steps. Writes
`results/memory_budget.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("llama", "qwen3", "mistral", "gpt2", "phi3")
STAGES = ("SFT", "DPO", "KTO", "Reward", "GRPO", "RLOO", "PPO")


def draw(rng: random.Random) -> dict[str, Any]:
    """Draw a run."""
    heads = rng.choice([4, 8])
    return {
        "stage": rng.choice(STAGES), "model_type": rng.choice(ARCHITECTURES), "layers": rng.choice([4, 6, 8, 12]),
        "heads": heads, "hidden": 64 * heads, "vocabulary": rng.choice([2048, 8192, 32768]),
        "tokens": rng.choice([256, 512, 1024]), "rows": rng.choice([4, 8]), "lora": rng.random() < 0.4,
        "bf16": rng.random() < 0.8, "fraction": rng.uniform(0.05, 0.95), "seed": rng.randrange(2**31),
    }  # fmt: skip


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Take two steps under a budget in this process, and return what was planned and what was resident."""
    import burnish
    from burnish.planner.plan import USABLE, estimate
    from burnish.planner.proposals import least_plan
    from burnish.training.memory_plan import _request

    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = _save_model(case, Path(folder))
        online = case["stage"] in ("GRPO", "RLOO", "PPO")
        fields: dict[str, Any] = {"max_completion_length": case["tokens"], "max_prompt_length": None} if online else {}
        if case["stage"] in ("GRPO", "RLOO"):
            fields["num_generations"] = 4
        config, trainer = (getattr(burnish, f"{case['stage']}{end}") for end in ("Config", "Trainer"))
        fields |= {} if online else {"max_length": None}
        settings: dict[str, Any] = {
            "output_dir": f"{folder}/out", "max_steps": 2, "per_device_train_batch_size": case["rows"],
            "token_budget": 10**6, "bf16": case["bf16"], "save_strategy": "no", "report_to": [], "progress": False,
            "use_cpu": True, "seed": case["seed"], **fields,
        }  # fmt: skip
        adapters = _lora() if case["lora"] else None
        rows = _rows(case)
        given: dict[str, Any] = {"reward_funcs": _digits} if online else {}

        # What the trainer plans: the rows' own lengths.
        length = case["tokens"] + 16
        args = config(**settings)
        request = _request(str(model), args, None, adapters)
        training = dict(request.training) | ({} if online else {"max_length": length})
        request = type(request)(
            request.kind, request.model, request.device, training, request.peft, request.model_init, 16
        )
        plan = estimate(request)
        least = least_plan(request).peak_bytes
        budget = (least + case["fraction"] * (plan.peak_bytes - least)) / USABLE + 1e6
        made = trainer(
            model=str(model), args=config(**settings, memory_budget=f"{budget / 1e9:.6f}GB"), train_dataset=rows,
            processing_class=tokenizer, peft_config=adapters, **given,
        )  # fmt: skip
        made.train()
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            **case, "configured": plan.peak_bytes, "least": least, "budget": round(budget),
            "planned": made._memory_plan.peak_bytes, "resident": resident, "kept": resident <= budget,
            "chosen": {name: getattr(made.args, name) for name, old in vars(args).items()
                       if name in training and getattr(made.args, name) != old and name != "memory_budget"},
        }  # fmt: skip


def _save_model(case: dict[str, Any], folder: Path) -> tuple[Path, Any]:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1, **{str(i): 2 + i for i in range(10)}}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>", pad_token="<eos>")
    hidden, heads = case["hidden"], case["heads"]
    sizes: dict[str, Any] = {
        "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": case["layers"],
        "num_attention_heads": heads, "num_key_value_heads": heads // 2, "max_position_embeddings": 4096,
    }  # fmt: skip
    if case["model_type"] == "gpt2":
        sizes = {"n_embd": hidden, "n_layer": case["layers"], "n_head": heads, "n_positions": 4096}
        sizes |= dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)
    config = AutoConfig.for_model(
        case["model_type"], vocab_size=case["vocabulary"], tie_word_embeddings=bool(case["seed"] % 2),
        bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model", tokenizer


def _rows(case: dict[str, Any]) -> list[dict[str, Any]]:
    prompt, answer = "0" * 16, "7" * (case["tokens"] - 1)
    rows: dict[str, dict[str, Any]] = {
        "SFT": {"prompt": prompt, "completion": answer},
        "DPO": {"prompt": prompt, "chosen": answer, "rejected": "1" + answer[1:]},
        "KTO": {"prompt": prompt, "completion": answer, "label": True},
    }  # fmt: skip
    row = rows.get(case["stage"], rows["DPO"])
    made = [dict(row) for _ in range(4 * case["rows"])]
    if case["stage"] == "KTO":
        for number, one in enumerate(made):
            one["label"] = number % 2 == 0
    return made


def _digits(completions: list[str], **columns: Any) -> list[float]:
    return [float(sum(c in "024" for c in text)) for text in completions]


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, target_modules="all-linear")


def in_process(case: dict[str, Any]) -> dict[str, Any]:
    """Run a case in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--case", json.dumps(case)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        return case | {"error": done.stderr[-1500:]}
    found = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{'kept' if found['kept'] else 'OVER'}  budget {found['budget'] / 1e9:.2f}  planned "
        f"{found['planned'] / 1e9:.2f}  resident {found['resident'] / 1e9:.2f}  as configured "
        f"{found['configured'] / 1e9:.2f} GB  "
        f"{case['stage']} {case['model_type']}{' LoRA' if case['lora'] else ''}  {found['chosen']}",
        flush=True,
    )
    return found


def main() -> None:
    """Draw and run all cases, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(run(json.loads(options.case))))
        return
    rng = random.Random(options.seed)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        rows = list(pool.map(in_process, [draw(rng) for _ in range(options.runs)]))
    done = [row for row in rows if "error" not in row]
    for row in rows:
        if "error" in row:
            print(row["error"])
    (ROOT / "benchmarks" / "results" / "memory_budget.json").write_text(json.dumps({"cases": rows}, indent=1) + "\n")
    ratios = [row["resident"] / row["planned"] for row in done]
    print(f"kept in {sum(row['kept'] for row in done)} of {len(rows)}; resident over planned: median "
          f"{median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
