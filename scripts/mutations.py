"""Break the code on purpose, one place at a time, and see a test fail: `make mutations`.

A mutation is a line of MUTATIONS: file, what stands there, what is put there, the tests that must notice. Each runs on
a copy of the sources; one that survives is printed and makes the command fail.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

TRAINERS, OBJECTIVES, PRECISION = "test_trainers.py", "test_objectives.py", "test_precision.py"
VALUE, CRITIC = "test_objectives_value.py", "test_critic.py"
SCORING, HEAD, NATIVE, SFT = "test_scoring.py", "test_head.py", "test_native.py", "test_sft.py"

MUTATIONS: tuple[tuple[str, str, str, str], ...] = (
    # objectives
    ("objectives/policy.py", "return -torch.minimum(", "return torch.minimum(", OBJECTIVES),
    ("objectives/policy.py", "ratio_N.clamp(1 - epsilon_low, 1 + epsilon_high)", "ratio_N.clamp(1 - epsilon_high, 1 + epsilon_low)", OBJECTIVES),
    ("objectives/policy.py", "-torch.minimum(unclipped_N", "-torch.maximum(unclipped_N", OBJECTIVES),
    ("objectives/policy.py", "advantages_N > 0, ratio_N > 1 + epsilon_high", "advantages_N < 0, ratio_N > 1 + epsilon_high", OBJECTIVES),
    ("objectives/policy.py", "logprobs_N - old_logprobs_N.detach()", "logprobs_N.detach() - old_logprobs_N", OBJECTIVES),
    ("objectives/supervised.py", "-logprobs_N.detach().exp()", "-logprobs_N.exp()", OBJECTIVES),
    ("objectives/kl.py", "ref_logprobs_N.detach() - logprobs_N", "logprobs_N - ref_logprobs_N.detach()", OBJECTIVES),
    ("objectives/aggregate.py", "/ lengths_S.clamp(min=1)).sum()", ").sum()", OBJECTIVES),
    ("advantages.py", "(r - mean) / divisor", "(mean - r) / divisor", "test_advantages.py"),
    ("advantages.py", "/ (len(values) - 1))", "/ len(values))", "test_advantages.py"),
    # trainers
    ("trainers/base.py", "denominator = self.sum_over_ranks(self.step_denominator(groups))", "denominator = 7.0", TRAINERS),
    ("trainers/base.py", "total -= 1", "pass", TRAINERS),
    ("trainers/grpo.py", "batch.sequence[\"advantages\"][batch.sequence_index]", "-batch.sequence[\"advantages\"][batch.sequence_index]", TRAINERS),
    ("trainers/grpo.py", "losses_N = losses_N + args.beta * kl_N", "losses_N = losses_N - args.beta * kl_N", TRAINERS),
    ("trainers/grpo.py", "return float(sequences * self.args.max_completion_length)", "return float(sequences)", TRAINERS),
    ("trainers/online.py", "masked = self.args.mask_truncated_completions and", "masked = self.args.mask_truncated_completions and not", TRAINERS),
    ("trainers/online.py", "if self._reuse > 1:", "if self._reuse > 100:", TRAINERS),
    ("trainers/online.py", "self._rollouts = int(state[\"rollouts\"])", "self._rollouts = 0", TRAINERS),
    ("trainers/online.py", "total(completion) is not None and not masked", "not masked", TRAINERS),
    ("trainers/online.py", "score(model, batch, temperature=self.args.temperature).logprobs", "score(model, batch).logprobs", TRAINERS),
    ("trainers/agreement.py", "(logprobs_N - sampled_logprobs_N).double()", "(sampled_logprobs_N - logprobs_N).double()", TRAINERS),
    ("trainers/agreement.py", "and difference / count <= self.mean_bound", "", TRAINERS),
    ("trainers/agreement.py", "clamp(-_CLIP_NATS, _CLIP_NATS)", "clamp(-9, 9)", TRAINERS),
    ("trainers/agreement.py", "self._window.popleft()", "break", TRAINERS),
    # the critic
    ("objectives/value.py", "rewards + gamma * next_values_N - values", "rewards + next_values_N - values", VALUE),
    ("objectives/value.py", "gamma * lam * sums_TS[time + 1]", "lam * sums_TS[time + 1]", VALUE),
    ("objectives/value.py", "torch.where(is_last_N, after_S[sequence_index_N], values.roll(-1))", "values.roll(-1)", VALUE),
    ("objectives/value.py", "(advantages_N + values).to", "(advantages_N - values).to", VALUE),
    ("objectives/value.py", "return rewards_N - beta * kl_N.detach()", "return rewards_N + beta * kl_N.detach()", VALUE),
    ("objectives/value.py", "torch.where(is_clipped_N, near_losses_N, losses_N)", "torch.where(is_clipped_N, losses_N, near_losses_N)", VALUE),
    ("objectives/value.py", "old_values_N + clip), old_values_N - clip)", "old_values_N + clip), old_values_N - 2 * clip)", VALUE),
    ("objectives/value.py", "0.0) / (count - 1)", "0.0) / count", VALUE),
    ("objectives/value.py", "- (total / count) ** 2", "", VALUE),
    ("packing.py", "values[j] = next(rest)", "values[j - 1] = next(rest)", "test_packing.py"),
    ("model/values.py", "        model = copy.deepcopy(model)\n", "", CRITIC),
    ("model/values.py", "copy.deepcopy(policy, shared).unload()", "copy.deepcopy(policy).unload()", CRITIC),
    ("model/values.py", "    if trained:\n", "    if False:\n", CRITIC),
    ("model/values.py", "value = exact.pop(parameter, parameter.data)", "value = parameter.data", CRITIC),
    ("model/values.py", "torch.default_generator.manual_seed(seed)", "pass", CRITIC),
    ("trainers/critic.py", "scale = vf_coef * self._ranks / max(count, 1.0)", "scale = vf_coef / max(count, 1.0)", CRITIC),
    ("trainers/critic.py", "scale = vf_coef * self._ranks", "scale = self._ranks", CRITIC),
    ("trainers/critic.py", "moments(returns_N - old_N)", "moments(returns_N - values_N)", CRITIC),
    ("trainers/critic.py", "self.learning_rate * lr_factor", "self.learning_rate", CRITIC),
    ("trainers/critic.py", "            parameter.copy_(weights[name])\n", "            pass\n", CRITIC),
    ("trainers/critic.py", "            self.optimizer.zero_grad(set_to_none=True)\n", "", CRITIC),
    ("trainers/critic.py", "self.optimizer.load_state_dict(dict(state[\"optimizer\"]))", "pass", CRITIC),
    ("trainers/critic.py", "        self.model.train()\n", "", CRITIC),
    ("trainers/critic.py", "if not math.isfinite(norm):", "if False:", CRITIC),
    # numbers
    ("model/precision.py", "_spread_over_rounding_cells(exact)", "pass", PRECISION),
    ("model/precision.py", "noise *= (values != 0)", "noise *= (values == values)", PRECISION),
    ("model/precision.py", "master.grad += p.grad", "master.grad = p.grad.to(torch.float32)", PRECISION),
    ("model/precision.py", "            master.copy_(value)\n", "", PRECISION),
    # packing, scoring, head
    ("packing.py", "positions += range(prompt_length, prompt_length + length)", "positions += range(length)", SCORING),
    ("packing.py", "else prompt_start + prompt_length - 1 for j in scored", "else start for j in scored", SCORING),
    ("model/scoring.py", "torch.ones_like(batch.input_ids),", "None,", SCORING),
    ("model/prefix.py", "positions[query] - positions[key] < rule.window", "positions[query] - positions[key] <= rule.window", SCORING),
    ("model/prefix.py", "torch.tanh(scores / softcap)", "torch.tanh(scores)", SCORING),
    ("model/head.py", "return self.spec.scale / self.temperature", "return self.spec.scale * self.temperature", HEAD),
    ("model/head.py", ".square_().neg_().add_(1)", ".square_().add_(1)", HEAD),
    ("model/head.py", "picked_N == max_N", "picked_N <= max_N", HEAD),
    ("model/head.py", "decay.square() * square_N[rows]", "decay * square_N[rows]", HEAD),
    ("model/scoring.py", "span.prompt[1] + span.completions[0][1]", "span.completions[0][1]", SCORING),
    # supervised fine-tuning
    ("trainers/sft.py", "self.neftune_noise_alpha = None", "pass", SFT),
    ("trainers/base.py", "if \"loss\" in logs else {}", "if True else {}", SFT),
    # preferences
    ("objectives/preference.py", "return self.chosen - self.ref_chosen", "return self.ref_chosen - self.chosen", "test_objectives_preference.py"),
    ("objectives/preference.py", "eps * F.logsigmoid(-margin_P)) / (1 - 2 * eps)", "eps * F.logsigmoid(-margin_P))", "test_objectives_preference.py"),
    ("trainers/preference.py", "if loss.per_token else denominator)\n        if", "if not loss.per_token else denominator)\n        if", "test_preference_trainer.py"),
    ("trainers/preference.py", "before = [groups[-1], *groups[:-1]]", "before = list(groups)", "test_preference_trainer.py"),
    ("trainers/preference.py", "    whole_groups = True", "    whole_groups = False", "test_preference_trainer.py"),
    ("trainers/preference.py", "shorter_S[batch.sequence_index], 1.0, float(self.args.ld_alpha))", "shorter_S[batch.sequence_index], float(self.args.ld_alpha), 1.0)", "test_preference_trainer.py"),
    ("trainers/preference.py", "moved=lambda: [known.clear() for known in self._known.values()]", "moved=lambda: None", "test_preference_trainer.py"),
    ("trainers/reference_sums.py", "if stored.get(\"key\") != key:", "if False:", "test_preference_trainer.py"),
    ("trainers/online_dpo.py", "completions=[best[1], worst[1]]", "completions=[worst[1], best[1]]", "test_online_dpo.py"),
    ("trainers/sft.py", "self._num_tokens = int(json.loads(file.read_text())[\"num_tokens\"])", "pass", SFT),
    ("trainers/stream.py", "if once:", "if True:", SFT),
    ("data/limits.py", "num_cut - len(group.prompt_ids)", "num_cut", "test_data.py"),
    ("data/limits.py", "place > 0 and (mask is None or mask[place])", "mask is None or mask[place]", "test_data.py"),
    # rollouts
    ("rollout/sampling.py", "for word in (seed, step, index, sample):", "for word in (seed, index, sample):", "test_sampling.py"),
    ("rollout/stepping.py", "request.first_sample + sample)", "sample)", NATIVE),
)  # fmt: skip


def survives(mutation: tuple[str, str, str, str]) -> str | None:
    """What to say of a mutation that no test noticed, or that could not be made."""
    name, old, new, tests = mutation
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "src", Path(folder) / "src")
        file = Path(folder) / "src" / "burnish" / name
        text = file.read_text()
        if text.count(old) != 1:
            return f"{name}: {old!r} stands there {text.count(old)} times"
        file.write_text(text.replace(old, new))
        environment = {**os.environ, "PYTHONPATH": str(Path(folder) / "src"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{tests}"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == 1:
            return None
        return f"{name}: {old!r} -> {new!r} survives {tests} (exit {done.returncode})"


def main() -> None:
    """All of them, two at a time."""
    survivors: list[str | None] = []
    with ThreadPoolExecutor(2) as pool:
        for number, survivor in enumerate(pool.map(survives, MUTATIONS), 1):
            print(f"{number}/{len(MUTATIONS)} {survivor or 'caught'}", flush=True)
            survivors.append(survivor)
    if any(survivors):
        raise SystemExit(f"{sum(s is not None for s in survivors)} mutations survive")


if __name__ == "__main__":
    main()
