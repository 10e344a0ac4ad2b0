"""TRL's online trainers on fixed completions, as JSON and weights: run by test_trl_online_parity.py in TRL's own
virtual environment."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import trl.trainer.grpo_trainer
import trl.trainer.rloo_trainer
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

for module in (trl.trainer.grpo_trainer, trl.trainer.rloo_trainer):
    # A rollout is shuffled before it is split into micro-batches; here they must be known.
    module.shuffle_sequence_dict = lambda rows: rows


def fixed(kind: type[Any], given: dict[str, Any], *, old: bool) -> type[Any]:
    """A trainer whose rollouts are given, with `old` their old log-probabilities too; it remembers its advantages."""

    class Fixed(kind):
        advantages: list[float]

        def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
            completions, logprobs = (given[name][: len(prompt_ids)] for name in ("completions", "sampler_logprobs"))
            return completions if kind is RLOOTrainer else (completions, logprobs)

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            output = super()._generate_and_score_completions(inputs)
            self.advantages = output["advantages"].tolist()
            return output

        def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            logprobs, *others = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
            if old and model is self.model and not torch.is_grad_enabled():
                for row, values in zip(logprobs, given["old_logprobs"][: len(logprobs)], strict=True):
                    row[: len(values)] = torch.tensor(values)
            return logprobs, *others

    return Fixed


def run(folder: Path, name: str, case: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Losses of the steps and advantages of one case; the weights go to a file."""
    is_rloo = case["trainer"] == "rloo"
    own = {key: value for key, value in case["config"].items() if not key.startswith("vllm_")}
    args = (RLOOConfig if is_rloo else GRPOConfig)(
        output_dir=str(folder / "out"), use_cpu=True, bf16=False, report_to="none", logging_steps=1,
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, shuffle_dataset=False, **own,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")

    def reward(place: int) -> Any:
        def scores(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
            return [given["rewards"][p + c][place] for p, c in zip(prompts, completions, strict=True)]

        scores.__name__ = f"reward_{place}"
        return scores

    kind = fixed(RLOOTrainer if is_rloo else GRPOTrainer, given, old=case["old"])
    trainer = kind(
        model=AutoModelForCausalLM.from_pretrained(folder / "policy"),
        reward_funcs=[reward(place) for place in case["rewards"]],
        args=args,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in given["prompts"][: case["prompts"]]]),
        processing_class=tokenizer,
    )
    if trainer.ref_model is not None:
        trainer.ref_model.load_state_dict(AutoModelForCausalLM.from_pretrained(folder / "reference").state_dict())
    if own != case["config"]:
        # vLLM is not installed: its part of the loss runs on the given log-probabilities all the same.
        trainer.use_vllm = True
        for key in case["config"].keys() - own.keys():
            setattr(trainer, key, case["config"][key])
    trainer.train()
    weights = {key: value.detach().clone() for key, value in trainer.model.named_parameters()}
    torch.save(weights, folder / f"{name}.pt")
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {"losses": [log["loss"] for log in logs], "advantages": trainer.advantages, "logs": logs}


def main(folder: Path) -> None:
    """Read cases, write results."""
    given = json.loads((folder / "cases.json").read_text())
    found = {name: run(folder, name, case, given) for name, case in given["cases"].items()}
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
