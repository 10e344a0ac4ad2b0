"""Break the code on purpose, one place at a time, and see a test fail: `make mutations`.

A mutation is a line of MUTATIONS: file, what stands there, what is put there, the tests that must notice. Each runs on
a copy of the sources; one that survives is printed and makes the command fail. With words as arguments only those run
whose line holds one of them: `scripts/mutations.py objectives/kl.py test_rounds`.
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

OFFLOAD, TRACE, BUDGET = "test_offload.py", "test_trace.py", "test_memory_plan.py"
TRAINERS, OBJECTIVES, MASTERS = "test_trainers.py", "test_objectives.py", "test_masters.py"
CRITIC, COLOCATED = "test_critic.py", "test_vllm_colocated.py"
TRANSFER, PLUGIN = "test_vllm_transfer.py", "test_vllm_plugin.py"
ADMISSION, SETTLED = "test_admission.py", "test_settled.py"
STANDBY, EIGHT_BITS = "test_standby.py", "test_cache_in_8_bits.py"
ROUNDED = f"{EIGHT_BITS}::test_logprobs_are_those_of_the_distribution_sampled_from"
KERNELS, FUSED, SANDBOX = "test_cpu_kernels.py", "test_fused_layers.py", "test_sandbox.py"
TREE = "test_sandbox.py::test_a_tree_of_processes_has_the_memory_of_one"
TERMS, TERMS_RUN = "test_rewards_terms.py", "test_policy_trainer.py::test_criteria_are_normalised_as_they_count"
TEXTS, POWERS = "test_rewards_texts.py", "test_rewards_powers.py"
OVERLAP = "test_reward_overlap.py"
BLOCKS = "test_reward_faults.py::test_a_coroutine_that_blocks_the_event_loop_harms_itself_alone"
KILLED = "test_reward_faults.py::test_an_answer_whose_worker_is_killed_again_is_excluded"
FAULT = "test_reward_faults.py::test_a_fault_excludes_what_it_hits_and_nothing_else"
SCORING, HEAD, NATIVE, SFT = "test_scoring.py", "test_head.py", "test_native.py", "test_sft.py"
ADVANTAGES, ROUNDS, PROMPTS = "test_advantages.py", "test_rounds.py", "test_prompts.py"
VALUE = "test_objectives_value.py"
TEXTARENA, GYM, MCP = "test_textarena.py", "test_gym_environment.py", "test_mcp.py"
ENVIRONMENT_FILES = "test_environment_files.py"
EPISODES, AGENTS = "test_episodes.py", "test_agents.py"
TOOLS, TOOL_FORMATS = "test_tools.py", "test_tool_formats.py"
GRADIENT = "test_policy_trainer.py::test_gradient_by_an_independent_script"
RECORDS = "test_policy_trainer.py::test_records_become_advantages_by_hand"
BETA = "test_policy_trainer.py::test_a_rollout_is_penalised_with_the_coefficient_before_its_own_divergence"
RLOO = "test_policy_trainer.py::test_rloo_s_advantages_by_hand"

MUTATIONS: tuple[tuple[str, str, str, str], ...] = (
    # rubrics
    ("rewards/rubric.py", "passed < least and", "passed <= least and", TERMS),
    ("rewards/rubric.py", "for name in (criterion.name, *criterion.gates)", "for name in (criterion.name,)", TERMS),
    ("rewards/rubric.py", "max(len(present) - 1, 1)", "len(present)", TERMS),
    ("rewards/criterion.py", "return self.weight * (low + (high - low) * part)", "return self.weight", TERMS),
    ("rewards/batch.py", "if known is None or key not in known}", "}", TERMS),
    ("rewards/batch.py", "or self._criterion.per_group or not", "or not", TERMS),
    ("stages/policy_gradient.py", "values = [terms.get(name)", "values = [completion.score.criteria.get(name)", TERMS_RUN),
    ("rewards/failure_bound.py", "failed <= self._most * total", "failed <= self._most * total + 1", "test_rewards_failure_bound.py"),
    ("rewards/texts.py", "len(own & other) / len(own | other)", "len(own & other) / len(own)", TEXTS),
    ("rewards/texts.py", "if not rest or texts", "if True or texts", TEXTS),
    # episodes
    ("environments/episodes.py", "done.loss_mask += [True] * len(turn.token_ids)", "done.loss_mask += [False] * len(turn.token_ids)", EPISODES),
    ("environments/episodes.py", "*([False] * len(tokens)), *mask[place:]", "*([True] * len(tokens)), *mask[place:]", EPISODES),
    ("environments/episodes.py", "request.first_sample + play.sample + turn * _TURN_SAMPLES", "request.first_sample + play.sample", EPISODES),
    ("environments/episodes.py", "[*play.opening, *sampled]", "[*request.prompt_ids, *sampled]", EPISODES),
    ("environments/episodes.py", "len(done.token_ids) + len(answer) >= room", "len(done.token_ids) + len(answer) > room + 8", EPISODES),
    ("environments/episodes.py", "await self._called(play.environment.cut, turn.text)", "pass", EPISODES),
    ("environments/episodes.py", "                await self._close(opened)\n", "", EPISODES),
    ("environments/setup.py", "made.tool_format = self.tool_format", "pass", EPISODES),
    ("environments/episodes.py", "if is_late or is_last or", "if is_late or", EPISODES),
    ("environments/episodes.py", "if is_late or is_last or", "if is_last or", EPISODES),
    ("environments/episodes.py", "len(set(column)) == 1", "True", EPISODES),
    ("environments/episodes.py", "episode.turns = [(start + len(rest), end + len(rest))", "episode.turns = [(start, end)", EPISODES),
    ("environments/episodes.py", "        except BaseException as error:  # sys.exit()", "        except Exception as error:  # sys.exit()", EPISODES),
    ("environments/episodes.py", "timeout=_PATIENCE_SECONDS", "timeout=100", EPISODES),
    ("environments/dialogue.py", "return ids if stop is None else ids[1:]", "return ids[1:]", EPISODES),
    ("environments/dialogue.py", "return ids if stop is None else ids[1:]", "return ids", EPISODES),
    ("environments/dialogue.py", "self._controls.sub(lambda found: f\"{found[0][0]} {found[0][1:]}\", plain)", "plain", EPISODES),
    ("environments/dialogue.py", "        if _ANSWER in whole:\n", "        if True:\n", EPISODES),
    ("environments/dialogue.py", "            if not turn.get(\"tool_calls\"):\n                raise\n", "            raise\n", EPISODES),
    ("environments/textarena.py", "            return Reply(done=True)\n", "            raise\n", TEXTARENA),
    ("environments/setup.py", "self._idle[name].append(environment)", "pass", EPISODES),
    ("rewards/rubric.py", "score.total, score.errors[\"environment\"] = None, completion.episode.error", "score.errors[\"environment\"] = completion.episode.error", AGENTS),
    ("rewards/verifiers.py", "if message[\"role\"] == \"assistant\"]", "]", AGENTS),
    ("objectives/advantages.py", "r - math.fsum(own[:k])", "r", AGENTS),
    ("rollout/native.py", "positions.extend(range(position, position + len(ids)))", "positions.extend(range(len(ids)))", "test_native.py::test_prompts_that_begin_alike_are_read_once"),
    ("rollout/cache.py", "own = position[key.shape[2] - query.shape[2] :]", "own = position[: query.shape[2]]", "test_native.py::test_prompts_that_begin_alike_are_read_once"),
    # tools
    ("environments/tools.py", "isinstance(value, bool) and schema", "False and schema", TOOLS),
    ("environments/tools.py", "tool.check(copy.deepcopy(call.arguments))", "tool.check(call.arguments)", TOOLS),
    ("environments/tools.py", "isinstance(decoded, list | dict)", "False", TOOLS),
    ("environments/tools.py", "        except BaseException as error:  # sys.exit()", "        except Exception as error:  # sys.exit()", TOOLS),
    ("environments/tools.py", "len(text) - self.max_result_chars} more", "len(text)} more", TOOLS),
    ("environments/tools.py", "fallback=show", "fallback=None", TOOLS),
    ("environments/schemas.py", "if name in inside:", "if False:", TOOLS),
    ("environments/schemas.py", "        schema[\"nullable\"] = True\n", "", TOOLS),
    ("environments/schemas.py", "config=ConfigDict(allow_inf_nan=False)", "config=ConfigDict()", TOOLS),
    ("environments/formats.py", "== [(_PROBE.name, _PROBE.arguments)]", "!= []", TOOL_FORMATS),
    ("environments/formats.py", "if end < block.end and", "if False and", TOOL_FORMATS),
    ("environments/formats.py", "if end < 0 or 0 <= text.find(opening) < end:", "if True:", TOOL_FORMATS),
    ("environments/formats.py", "if (end := text.find(closing, at)) < 0:\n                return", "if (end := text.find(closing, at)) < 0:\n                end = at", TOOL_FORMATS),
    ("environments/formats.py", "texts[1].count(word) > texts[0].count(word)", "word in texts[1]", TOOL_FORMATS),
    ("environments/conventions.py", "object_pairs_hook=object_of, ", "", TOOL_FORMATS),
    ("environments/conventions.py", "parse_float=_finite, ", "", TOOL_FORMATS),
    ("environments/conventions.py", "strict=False, ", "", TOOL_FORMATS),
    ("environments/conventions.py", "if key not in fields and others:", "if False:", TOOL_FORMATS),
    ("environments/json_calls.py", "(keys & {\"parameters\", \"arguments\"})", "(keys)", TOOL_FORMATS),
    ("environments/text_calls.py", "or re.compile(tags.opening).search(text, at, end.start())", "", TOOL_FORMATS),
    ("environments/text_calls.py", "or \"string\" not in admitted", "or True", TOOL_FORMATS),
    ("rewards/batch.py", "if len(values) == 1 else error", "", FAULT),
    ("rewards/batch.py", "return TypeError(f\"it returned", "return [0.0] * size if size else TypeError(f\"it returned", FAULT),
    ("rewards/batch.py", "return number if math.isfinite(number) else", "return number if number == number else", FAULT),
    ("rewards/pool.py", "                except _WorkerKilled:\n                    raise\n", "", KILLED),
    ("rewards/pool.py", "with contextlib.suppress(_WorkerKilled):", "with contextlib.nullcontext():", KILLED),
    ("rewards/calls.py", "late = self if task is None else _owners.get(task, self)", "late = self", BLOCKS),
    ("rewards/calls.py", "        if home is not shared_loop():\n", "        if False:\n", BLOCKS),
    ("rewards/batch.py", "for position in sorted(self._begun)]", "for position in self._begun]", OVERLAP),
    ("rewards/rubric.py", "extras=[extra for part in begun for extra in part.extras])", "extras=batch.extras)", OVERLAP),
    ("rewards/rubric.py", "            if criterion.overlaps:\n                grading.start(batch, position)", "            if False:\n                pass", OVERLAP),
    ("rewards/rubric.py", "if [ids for part in begun for ids in part.completion_ids] != batch.completion_ids:", "if False:", OVERLAP),
    ("rewards/criterion.py", "and \"log_metric\" not in parameters_of(self.function))", ")", OVERLAP),
    ("rollout/native.py", "row.prompt.request.on_done is not None and len(completions) == row.prompt.request.num_samples", "row.prompt.request.on_done is not None", OVERLAP),
    ("rollout/lockstep.py", "                    sampling.remove(group)\n", "", OVERLAP),
    ("stages/sampler.py", "replace(r, on_done=partial(scoring.start, place))", "r", OVERLAP),
    ("rollout/vllm/colocated.py", "replace(request, on_done=None) for", "request for", COLOCATED),
    ("rollout/vllm/dispatch.py", "                job.request.on_done(found)\n", "                pass\n", "test_vllm_pool.py::test_groups_are_reported_as_they_finish_and_an_error_of_that_is_raised"),
    ("rewards/judge.py", "self.slots.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self.max_concurrency))", "asyncio.Semaphore(self.max_concurrency)", "test_rewards_judge.py"),
    # adapters of environments
    ("environments/textarena.py", "            vars(module)[\"random\"] = _RANDOM\n", "            pass\n", TEXTARENA),
    ("environments/textarena.py", "self._rng.randrange(self._players) if", "0 if", TEXTARENA),
    ("environments/textarena.py", "if not (sender == self.seat and kind.name == \"PLAYER_ACTION\")", "if True", TEXTARENA),
    ("environments/textarena.py", "action=without_reasoning(text)", "action=text", TEXTARENA),
    ("environments/textarena.py", "float(given[self.seat])", "float(given[0])", TEXTARENA),
    ("environments/textarena.py", "        if not self._is_done:\n            return self._unfinished\n", "        if not self._is_done:\n            return 0.0\n", TEXTARENA),
    ("environments/textarena.py", "trial = copy.deepcopy(self.game)", "trial = self.game", TEXTARENA),
    ("environments/gym.py", "self._cost * max(len(self.scores) - 1, 0)", "self._cost * len(self.scores)", GYM),
    ("environments/gym.py", "done=score >= 1.0 or left == 0", "done=left == 0", GYM),
    ("environments/mcp.py", "return MCPSession(server, first.listed) if per_episode else", "return MCPSession(server, first.listed) if False else", MCP),
    ("environments/mcp.py", "                self.close()\n            raise", "            raise", MCP),
    ("environments/mcp.py", "        if result.is_error:", "        if False:", MCP),
    ("environments/mcp.py", "            raise BadArguments(problems)", "            pass", MCP),
    ("environments/tool_use.py", "            self._subject.close()\n", "            pass\n", MCP),
    ("environments/registry.py", "        if name in made:", "        if False:", ENVIRONMENT_FILES),
    ("data/held_out.py", "if any(text for _, text in key)", "if True", ENVIRONMENT_FILES),
    ("rollout/collect.py", ", row=g.row)", ")", ENVIRONMENT_FILES),
    # native engine
    ("rollout/drafts.py", "if place >= gram:", "if place > gram + 9:", "test_drafts.py"),
    ("rollout/drafts.py", "return drawn / (self._fixed + rows * width)", "return drawn", "test_drafts.py"),
    ("rollout/decoding.py", "if place == len(guess) or token[0] != guess[place]:", "if place == len(guess):", "test_drafts.py"),
    ("rollout/cache.py", "seen = position <= step.positions[:, None]", "seen = position <= step.positions.max()", NATIVE),
    ("rollout/cache.py", "own = own.minimum(most[:, None] - 1)", "own = own.minimum(most[:, None])", "test_drafts.py"),
    ("rollout/packed_linears.py", "hidden._version != self._version", "False", NATIVE),
    ("rollout/packed_linears.py", 'and module.weight.device.type == "cpu"', "", STANDBY),
    ("rollout/native.py", "run = self._new_run(prompts, seed, step)", "run = self._kept = self._new_run(prompts, seed, step)", STANDBY),
    ("rollout/native.py", "self._reserve(run, own_tokens=run.own_tokens)", "pass", f"{EIGHT_BITS}::test_more_rows_fit_under_a_bound"),
    ("rollout/stored.py", "self.scales[slots, :tokens] = source.scales[slot, :tokens]", "pass", EIGHT_BITS),
    ("rollout/stored.py", "(power + rest)", "power", f"{EIGHT_BITS}::test_a_rotation_leaves_products_as_they_are"),
    ("rollout/cache.py", "query=rotated_queries(call.query), ", "", ROUNDED),
    ("rollout/cache.py", "kept = rotated_keys(key) if self._in_8_bits else key", "kept = key", ROUNDED),
    ("rollout/cache.py", "values, mask[start:stop]", "values, mask[: stop - start]", ROUNDED),
    ("rollout/cpu_kernels.cpp", "rescale(scores, of_values, wide, length, n.repeats);", "", f"{EIGHT_BITS}::test_attention_is_that_to_the_widened_values"),
    ("rollout/cpu_kernels.cpp", "most / 127 + poison", "most / 127", f"{EIGHT_BITS}::test_what_is_no_number_stays_so_for_its_token_and_head"),
    ("rollout/engines.py", "bytes_in_8_bits(value) if", "value.nbytes if", f"{EIGHT_BITS}::test_more_rows_fit_under_a_bound"),
    ("training/sampler_check.py", 'cache_dtype == "int8" or ', "", f"{EIGHT_BITS}::test_a_run_trains_and_its_check_sees_the_rounding"),
    ("rollout/cpu_kernels.cpp", "_tile_dpbf16ps(3, 5, 7)", "_tile_dpbf16ps(3, 5, 6)", KERNELS),
    ("rollout/cpu_kernels.cpp", "row < M; row += 32", "row < M / 32 * 32; row += 32", KERNELS),
    ("rollout/cpu_kernels.cpp", "length = place + 1", "length = std::max<int64_t>(place, 1)", KERNELS),
    ("rollout/cpu_kernels.cpp", "(bits >> 16) & 1", "0", KERNELS),
    ("rollout/cpu_kernels.cpp", "return most + logf(total)", "return logf(total)", KERNELS),
    ("rollout/cpu_kernels.cpp", "n.kv_heads * n.value_size};", "n.kv_heads * n.size};", KERNELS),
    ("rollout/cpu_kernels.cpp", "sum / K + epsilon", "sum / K", KERNELS),
    ("rollout/fused_norms.py", "if agree[type(norm.module)]]", "]", KERNELS),
    ("rollout/fused_layers.py", "layer.error <= _MOST_ERROR", "True", FUSED),
    ("rollout/fused_layers.py", "and hidden.shape[1] <= MOST_ROWS", "", FUSED),
    ("rollout/fused_layers.py", "and p.computes(group)", "", FUSED),
    ("rollout/fused_layers.py", "for x in (*norms, *packed)) != shapes", "for x in ())", FUSED),
    ("rollout/cpu_kernels.cpp", "straight - to_float", "straight + to_float", FUSED),
    ("rollout/cpu_kernels.cpp", "if (norm) norm_row(x, norm, x, size, n.head_epsilon);", "", FUSED),
    ("rollout/cpu_kernels.cpp", "n.gate_up, n.gate_up_bias, gate_up", "n.gate_up, nullptr, gate_up", FUSED),
    ("rollout/cpu_kernels.cpp", "x < 0 ? decayed : 1.0f", "1.0f", FUSED),
    ("rollout/native.py", "key=expected_tokens, reverse=True", "key=expected_tokens", ADMISSION),
    ("rollout/native.py", "return mean if tokens is None else tokens", "return 0.0 if tokens is None else tokens", ADMISSION),
    ("stages/sampler.py", "lengths = self.lengths if is_training else {}", "lengths = self.lengths", ADMISSION),
    ("stages/online.py", "= state.buffer, state.replay, state.lengths", "= state.buffer, state.replay, {}", ADMISSION),
    ("rollout/compiled.py", "_adapter_state(base))", "())", "test_compiled.py"),
    ("rollout/compiled.py", " or not graph.takes(len(tokens))", "", "test_compiled.py"),
    ("model/attention.py", "    with _disable_current_modes():", "    if True:", "test_compiled.py"),
    ("stages/online.py", "args.max_steps / (self.steps_per_pass * self.algorithm.passes)", "args.max_steps", "test_compiled.py"),
    # memory
    ("model/offload.py", "if storage_key(tensor) in self.kept:", "if False:", OFFLOAD),
    ("model/offload.py", "or not tensor.is_floating_point()", "", OFFLOAD),
    ("model/offload.py", "parked.coming, parked.is_used = None, True", "parked.coming, parked.is_used = None, False", OFFLOAD),
    ("model/offload.py", "tensor.to(\"cpu\", copy=True)", "tensor.to(\"cpu\")", OFFLOAD),
    ("model/recomputation.py", "rows.tensor_split(tiles)", "rows.tensor_split(1)", "test_recomputation.py"),
    ("model/recomputation.py", "return self.save(tensor)", "return tensor", OFFLOAD),
    ("model/host_embedding.py", "embedding.register_state_dict_post_hook(_add_weight)", "pass", "test_host_embedding.py"),
    ("model/host_embedding.py", "elif embedding.weight.requires_grad:", "elif False:", "test_host_embedding.py"),
    ("training/ledger.py", "\"host\" if is_on_host() else \"device\"", "\"device\"", TRACE),
    ("training/ledger.py", "self._live[place][component] -= size", "pass", TRACE),
    ("training/trace.py", "self.weight.numel() * bits / 8", "self.weight.numel() * bits / 4", TRACE),
    ("training/trace.py", "[small] * min(num_parts - 1, 2) + [batch]", "[batch]", TRACE),
    ("planner/memory.py", "mlp = mlp // method.mlp_tiles + 2 * shape.hidden", "mlp = mlp + 2 * shape.hidden", TRACE),
    ("planner/update.py", "self.table if self.num_parts > 1 else 0", "0", TRACE),
    ("planner/update.py", "max(least, most - least) + (sum(adapted)", "0 * (sum(adapted)", TRACE),
    ("planner/run.py", "dataclasses.replace(shape, tied=True)", "shape", TRACE),
    ("planner/memory.py", "shape.keys + 2 * shape.kv_heads if", "shape.keys if", "test_planner.py::test_bytes_per_token_by_hand"),
    ("planner/proposals.py", "rollout to 8 bits\", \"method\"", "rollout to 8 bits\", \"nothing\"", "test_planner.py::test_a_cache_in_8_bits_is_planned_and_proposed"),
    ("planner/budget.py", "propose(request, only_exact=True)", "propose(request)", BUDGET),
    ("planner/budget.py", "request, chosen = change.apply(request), chosen | dict(change.values)", "pass", BUDGET),
    ("training/memory_plan.py", "vars(args).update(budgeted.chosen)", "pass", BUDGET),
    ("training/memory_plan.py", "if args.memory_budget is None and args.check_memory:", "if False:", BUDGET),
    ("training/memory_plan.py", 'fields["max_length"] = length', "pass", BUDGET),
    ("training/memory_plan.py", ' // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))', "", BUDGET),
    ("training/metrics.py", "torch.where(chosen_N, values_N.values.detach(), 0).sum()", "values_N.values.detach().sum()", "test_preference_trainer.py"),
    ("stages/dpo.py", "batch.sequence_index % 2 == 0)", "batch.sequence_index % 2 >= 0)", "test_preference_trainer.py"),
    ("model/prefix.py", "np.arange(span.prompt[1], span.prompt[1] + length)", "np.arange(length)", "test_attention.py"),
    # settled rewards
    ("rollout/decoding.py", "len(done.token_ids) % _CHECK_TOKENS == 0 and", "len(done.token_ids) >= 8 and", SETTLED),
    ("rollout/decoding.py", "text[: len(text) - begun]", "text", SETTLED),
    ("rollout/decoding.py", "if self.completion.token_ids[-1] in self._ends:", "if False:", SETTLED),
    ("rollout/decoding.py", "done.stop_reason = StopReason.SETTLED", "done.stop_reason = StopReason.LENGTH", SETTLED),
    ("rollout/stop_strings.py", "return text.rstrip(_REPLACEMENT)", "return text", SETTLED),
    ("rollout/validation.py", "elif reason is StopReason.SETTLED and request.is_settled is None:", "elif False:", "test_validation.py"),
    ("rewards/settled.py", "for c in rubric.criteria if not c.never_counts or c.name in gates]", "for c in rubric.criteria]", SETTLED),
    ("rewards/settled.py", "return all(self._ask(", "return any(self._ask(", SETTLED),
    ("rewards/settled.py", "if not isinstance(answer, bool):", "if False:", SETTLED),
    ("rewards/settled.py", "{**call.keywords, **options}", "{**options, **call.keywords}", SETTLED),
    # sandbox
    ("rewards/jail/zygote.py", "_PER_RUN = kernel.NEW_MOUNTS | kernel.NEW_PIDS", "_PER_RUN = kernel.NEW_MOUNTS", SANDBOX),
    ("rewards/jail/zygote.py", "        options = f\"size={request['file_bytes']},nr_inodes", "        options = f\"nr_inodes", SANDBOX),
    ("rewards/jail/zygote.py", "            resource.RLIMIT_AS: request[\"memory_bytes\"],\n", "", SANDBOX),
    ("rewards/jail/zygote.py", "resource.setrlimit(resource.RLIMIT_NPROC,", "(", SANDBOX),
    ("rewards/jail/zygote.py", "            if spec[\"level\"] == \"landlock\":", "            if False:", SANDBOX),
    ("rewards/jail/entry.py", "        os.setresuid(INNER_USER, INNER_USER, INNER_USER)\n", "", SANDBOX),
    ("rewards/jail/entry.py", "    kernel.NEW_MOUNTS | kernel.NEW_PIDS | kernel.NEW_NETWORK |", "    kernel.NEW_MOUNTS | kernel.NEW_PIDS |", SANDBOX),
    ("rewards/jail/entry.py", "*(f\"/dev/{name}\" for name in DEVICES)]", "\"/dev\"]", SANDBOX),
    ("rewards/jail/filters.py", "\"socket\": (41, 198), ", "", SANDBOX),
    ("rewards/jail/filters.py", "\"unshare\": (272, 97), ", "", SANDBOX),
    ("rewards/jail/filters.py", "\"memfd_create\": (319, 279), ", "", SANDBOX),
    ("rewards/jail/filters.py", ", \"vmsplice\": (278, 75)", "", SANDBOX),
    ("rewards/jail/filters.py", "code += _on_argument(_MMAP[machine], 3, shared)", "pass", SANDBOX),
    ("rewards/jail/entry.py", "\"random\", \"urandom\")", "\"random\", \"urandom\", \"zero\")", SANDBOX),
    ("rewards/sandbox/memory.py", "        found += _children(child)\n", "        pass\n", TREE),
    ("rewards/sandbox/memory.py", "for thread in os.listdir(f\"/proc/{pid}/task\"):", "for thread in [str(pid)]:", TREE),
    ("rewards/sandbox/memory.py", "(\"Pss_Anon:\", \"SwapPss:\")", "(\"Anonymous:\", \"SwapPss:\")", "test_sandbox.py::test_what_processes_share_counts_once"),
    ("rewards/sandbox/memory.py", "if pid in descendants(ancestor):", "if True:", "test_sandbox.py::test_memory_by_what_the_kernel_lets_be_read"),
    ("rewards/sandbox/zygotes.py", "kill_all(below[1:], self._pid)", "kill_all(below[2:], self._pid)", TREE),
    ("rewards/programs.py", "    \"memory\": \"took too much memory\",\n", "", "test_sandbox.py::test_an_answer_of_too_many_processes_scores_zero"),
    ("rewards/jail/judge.py", "_ask(self, operation, other) if isinstance(other, Proxy) else NotImplemented", "_ask(self, operation, other)", SANDBOX),
    ("rewards/jail/judge.py", "if not hasattr(builtins, name) and not", "if not", SANDBOX),
    ("rewards/jail/judge.py", "importlib.import_module(name) if name in modules else decode(value, self.handle)", "decode(value, self.handle)", SANDBOX),
    ("rewards/programs.py", "or [0] * len(tests)", "or [1] * len(tests)", SANDBOX),
    ("rewards/programs.py", "run.end == \"ok\" and _lines", "_lines", SANDBOX),
    ("rewards/sandbox/sql.py", "depth += (character == \"(\") - (character == \")\")", "pass", "test_sandbox_verifiers.py"),
    ("rewards/sandbox/sql.py", "if cursor.description is None:", "if False:", "test_sandbox_verifiers.py"),
    ("rewards/sandbox/sql.py", "found == wanted if job[\"ordered\"] else ", "", "test_sandbox_verifiers.py"),
    ("rewards/failures.py", "failures == \"zero\" and", "", "test_rewards_verifiers.py"),
    ("rewards/answers.py", "end, start = min(closed)", "end, start = max(closed)", SETTLED),
    ("rewards/formats.py", "text = text[: text.index(closing) + len(closing)]", "pass", SETTLED),
    ("rewards/formats.py", "return text.count(f\"<{name}>\") > 1 or (", "return text.count(f\"<{name}>\") > 0 or (", SETTLED),
    ("rewards/catalogue.py", "return text.count(\"<think>\") > 1 or not", "return text.count(\"<think>\") > 0 or not", SETTLED),
    ("stages/sampler.py", "rule = self._stage.settled if is_training else None", "rule = self._stage.settled", SETTLED),
    ("types.py", "self.stop_reason in (StopReason.LENGTH, StopReason.BUDGET)", "self.stop_reason is not StopReason.EOS", SETTLED),
    # vLLM
    ("rollout/vllm/wire.py", '"seed": key + request.first_sample', '"seed": key', "test_vllm_wire.py"),
    ("rollout/vllm/updates.py", "version != self._version or ", "", "test_vllm_pool.py"),
    ("rollout/vllm/updates.py", "raise CheckFailed(f\"{who}", "print(f\"{who}", "test_vllm_pool.py"),
    ("rollout/vllm/updates.py", "if update.base and _nearer", "if False and _nearer", "test_vllm_pool.py"),
    ("rollout/vllm/updates.py", "if tokens > longest:", "if tokens > longest + 1:", COLOCATED),
    ("rollout/vllm/weights.py", "name not in left_out and ", "", COLOCATED),
    ("rollout/vllm/weights.py", "return revert_weight_conversion(lm, state)", "return state", COLOCATED),
    ("rollout/vllm/colocated.py", "        if self._proven is None:\n", "        if False:\n", COLOCATED),
    ("rollout/vllm/colocated.py", "if not is_new and self._proven is update:", "if not is_new:", COLOCATED),
    ("rollout/vllm/colocated.py", "        if not self._llm.is_loaded:\n", "        if False:\n", COLOCATED),
    ("rollout/vllm/colocated.py", "any(self._gathered([is_new]))", "is_new", COLOCATED),
    ("rollout/vllm/colocated.py", "if not update.is_adapter or not self._llm.is_loaded:", "if True:", COLOCATED),
    ("rollout/vllm/colocated.py", "lists[: self._rank - first]", "lists[:0]", COLOCATED),
    ("rollout/vllm/colocated.py", "self._rank // size * size", "0", COLOCATED),
    ("rollout/vllm/colocated.py", "        if any(problems):", "        if problems[self._rank]:", COLOCATED),
    ("rollout/vllm/embedded.py", "if processes % tensor_parallel_size:", "if False:", COLOCATED),
    ("rollout/vllm/embedded.py", "if Version(version) < Version(_VERSION):", "if False:", COLOCATED),
    ("training/checks.py", "            check_embedding(", "            print(", COLOCATED),
    ("stages/online.py", "        shards, sampled = self.sampler.sample()\n        self.sampler.rest()\n", "        shards, sampled = self.sampler.sample()\n", COLOCATED),
    ("config/online_fields.py", 'self.vllm_mode == "colocate" and self.vllm_model_impl', 'self.vllm_mode == "server" and self.vllm_model_impl', COLOCATED),
    # sampling ahead of training
    ("rollout/vllm/wire.py", "for piece in pieces for _ in piece.token_ids", "for piece in pieces[:1] for _ in ids", "test_vllm_wire.py"),
    ("rollout/vllm/wire.py", "_stop_length(ids, params.stop, tokenizer) if len(pieces) > 1 else None", "None", "test_vllm_wire.py"),
    ("rollout/vllm/dispatch.py", "**by, sampled=len(ids)", "**by", "test_vllm_wire.py"),
    ("rollout/vllm/dispatch.py", "await server.client.post(\"/pause?mode=abort\", {}, deadline=self._pool.deadlines.sync)", "pass", "test_vllm_pool.py"),
    ("stages/sampler.py", "wanted = num_prompts + min(args.staleness_bound, later)", "wanted = num_prompts + args.staleness_bound", "test_staleness.py"),
    ("stages/sampler.py", "if stalest > bound:", "if stalest > 99:", "test_staleness.py"),
    ("stages/lookahead.py", "if begun.shard.position < end]", "][:number]", "test_staleness.py"),
    ("rollout/vllm/engine.py", "busy = set(self._gathered(list(pool.call(pool.hold()))))", "busy = pool.call(pool.hold())", "test_vllm_pool.py"),
    ("rollout/vllm/engine.py", "        self._gathered([])", "        pass", "test_vllm_pool.py"),
    ("rollout/vllm/pool.py", "self.update, self.mode = update, mode", "self.update = update", "test_vllm_pool.py::test_every_rank_knows_which_log_probabilities_it_gets"),
    ("rollout/vllm/delivery.py", '== f"{update.tag}{_ON_ITS_WAY}" and', "== 0 and", "test_vllm_pool.py"),
    ("rollout/vllm/delivery.py", 'await _mark(client, f"{update.tag}{FAILED}")', "pass", f"{TRANSFER}::test_a_server_that_fails_half_way_answers_nothing_until_it_is_restarted"),
    ("rollout/vllm/delivery.py", "if is_cut and not transfer.resumes:", "if False:", f"{TRANSFER}::test_a_trainer_that_ended_in_the_middle_leaves_no_mixture"),
    ("rollout/vllm/delivery.py", "if found.endswith(FAILED):", "if False:", f"{TRANSFER}::test_a_server_that_fails_half_way_answers_nothing_until_it_is_restarted"),
    ("rollout/vllm/delivery.py", "        if not is_cut:", "        if True:", f"{TRANSFER}::test_a_mixture_stays_paused_when_nothing_can_be_prepared"),
    ("rollout/vllm/delivery.py", "        if not is_cut:", "        if False:", f"{TRANSFER}::test_weights_that_cannot_be_prepared_leave_the_version_before"),
    ("rollout/vllm/transfer.py", " and all(used == [ours] for used in theirs)", "", f"{TRANSFER}::test_the_way_is_chosen_by_where_the_weights_are"),
    ("rollout/vllm/transfer.py", " and not any(ours in used for used in theirs)", "", f"{TRANSFER}::test_the_way_is_chosen_by_where_the_weights_are"),
    ("rollout/vllm/transfer.py", " or overlaps or", " or", f"{TRANSFER}::test_the_way_is_chosen_by_where_the_weights_are"),
    ("rollout/vllm/transfer.py", "if theirs and theirs != [ours]:", "if False:", f"{TRANSFER}::test_a_server_on_another_gpu_is_refused_before_anything_changes"),
    ("rollout/vllm/transfer.py", " and version.startswith(update.run):", ":", f"{TRANSFER}::test_a_restarted_server_is_met_in_a_group_again"),
    ("rollout/vllm/transfer.py", 'if "already active" not in str(error):', "if True:", f"{TRANSFER}::test_a_trainer_that_ended_in_the_middle_leaves_no_mixture"),
    ("rollout/vllm/transfer.py", "            sender.shutdown()", "            pass", f"{TRANSFER}::test_a_server_that_fails_half_way_answers_nothing_until_it_is_restarted"),
    ("rollout/vllm/engine.py", 'needs_folder = transport == "folder" or', "needs_folder = True or", f"{TRANSFER}::test_servers_sample_from_what_was_sent"),
    ("vllm_plugin.py", "            os._exit(_FAILED_COMMIT)", "            raise", PLUGIN),
    ("vllm_plugin.py", "            self._pack_heads()\n", "", PLUGIN),
    ("vllm_plugin.py", "!= manifest.checksum:", "!= manifest.checksum and False:", PLUGIN),
    ("vllm_plugin.py", "            self._check_layout(_layout(tensors))\n", "", PLUGIN),
    ("vllm_plugin.py", "            self._check_sizes(manifest.folder)\n", "", PLUGIN),
    ("vllm_plugin.py", "if manifest.run != self._run:", "if False:", PLUGIN),
    ("cli/serve.py", "if _has_failed(url, 10 * args.interval):", "if False:", "test_serve.py::test_a_server_with_a_part_of_a_version_is_started_again"),
    ("config/online_fields.py", "self.use_vllm and self.staleness_bound and", "False and", f"{TRANSFER}::test_weights_that_change_while_servers_sample_go_by_the_folder"),
    ("stages/sampler.py", "return self.source.position - (0 if self.ahead is None else len(self.ahead))", "return self.source.position", "test_staleness.py"),
    ("stages/sampler.py", "state.global_step - begun > bound", "state.global_step - begun > 99", "test_staleness.py"),
    ("stages/online.py", "fresh_N &= version_N.isnan() | (version_N == self.run.state.global_step)", "pass", "test_staleness.py"),
    ("config/policy_fields.py", "(\"token_truncate\" if self.max_staleness else None)", "None", "test_staleness.py"),
    ("stages/policy_gradient.py", "return \"policy_logprobs\" if self.args.staleness_bound else", "return \"policy_logprobs\" if False else", "test_staleness.py"),
    ("rollout/vllm/identity.py", "if all(abs(value - k) < _ROUNDED_NATS", "if all(abs(value - k) < 99", "test_vllm_pool.py"),
    ("rollout/vllm/wire.py", "sampled if mode == \"processed\" or samples_policy(params) else None", "sampled", "test_vllm_wire.py"),
    # phases
    ("training/phases.py", "seconds / max(self._steps, 1)", "seconds", "test_phases.py"),
    ("training/phases.py", "if self._current != \"evaluation\":", "if self._current is None:", "test_phases.py"),
    ("training/phases.py", "        self._since = now", "        pass", "test_phases.py::test_phases_of_two_steps_by_hand"),
    # objectives
    ("objectives/policy.py", "return -torch.minimum(", "return torch.minimum(", OBJECTIVES),
    ("objectives/policy.py", "ratio_N.clamp(1 - epsilon_low, 1 + epsilon_high)", "ratio_N.clamp(1 - epsilon_high, 1 + epsilon_low)", OBJECTIVES),
    ("objectives/policy.py", "-torch.minimum(unclipped_N", "-torch.maximum(unclipped_N", OBJECTIVES),
    ("objectives/policy.py", "advantages_N > 0, ratio_N > 1 + epsilon_high", "advantages_N < 0, ratio_N > 1 + epsilon_high", OBJECTIVES),
    ("objectives/policy.py", "logprobs_N - old_logprobs_N.detach()", "logprobs_N.detach() - old_logprobs_N", OBJECTIVES),
    ("objectives/supervised.py", "-logprobs_N.detach().exp()", "-logprobs_N.exp()", OBJECTIVES),
    ("objectives/policy.py", "if level == \"product\":", "if level == \"none\":", OBJECTIVES),
    ("objectives/policy.py", "means_N = sequence_means(difference_N, sequence", "means_N = sequence_sums(difference_N, sequence", OBJECTIVES),
    ("objectives/policy.py", "means_N.detach() + difference_N", "means_N + difference_N", OBJECTIVES),
    ("objectives/policy.py", "difference_N - difference_N.detach()", "difference_N.detach() - difference_N.detach()", OBJECTIVES),
    ("objectives/policy.py", "ratio_N.clamp(max=delta)", "ratio_N.clamp(min=delta)", OBJECTIVES),
    ("objectives/policy.py", "ratio_N = log_ratio_N.detach().exp()", "ratio_N = log_ratio_N.exp()", OBJECTIVES),
    ("objectives/policy.py", "-ratio_N.clamp(max=bound)", "-ratio_N", OBJECTIVES),
    ("objectives/policy.py", "(ratio_N > bound) & (advantages_N > 0)", "(ratio_N > bound)", OBJECTIVES),
    ("objectives/policy.py", "masked_fill(advantages_N > 0, temperature_pos)", "masked_fill(advantages_N < 0, temperature_pos)", OBJECTIVES),
    ("objectives/policy.py", "-4 / tau_N", "-4", OBJECTIVES),
    ("objectives/policy.py", "masked_fill(positive_N, k_pos)", "masked_fill(~positive_N, k_pos)", OBJECTIVES),
    ("objectives/policy.py", "lambda_N * (1 - log_w_N.exp())", "lambda_N * log_w_N.exp()", OBJECTIVES),
    ("objectives/policy.py", "-weights_N.detach() * advantages_N", "weights_N.detach() * advantages_N", OBJECTIVES),
    ("objectives/policy.py", "terms_N + weights_N.log()", "terms_N - weights_N.log()", OBJECTIVES),
    ("objectives/entropy.py", "if entropy <= target", "if entropy > target", OBJECTIVES),
    ("objectives/policy.py", "PolicyLoss(_clip, \"sum\")", "PolicyLoss(_clip, \"token\")", OBJECTIVES),
    ("objectives/policy.py", "return self.epsilon if self.epsilon_high is None else self.epsilon_high", "return self.epsilon", OBJECTIVES),
    ("objectives/policy.py", "(old_logprobs_N - sampler_logprobs_N).detach()", "(sampler_logprobs_N - old_logprobs_N).detach()", OBJECTIVES),
    ("objectives/policy.py", "(old_logprobs_N - sampler_logprobs_N).detach()", "(old_logprobs_N - sampler_logprobs_N)", OBJECTIVES),
    ("objectives/policy.py", "if level == \"sequence\":", "if level == \"token\":", OBJECTIVES),
    ("objectives/policy.py", "(weights_N >= low) & (weights_N <= high)", "(weights_N >= low) | (weights_N <= high)", OBJECTIVES),
    ("objectives/policy.py", "if treatment == \"truncate\":", "if treatment == \"mask\":", OBJECTIVES),
    ("objectives/kl.py", "return logprobs_N - ref_logprobs_N.detach()", "return ref_logprobs_N.detach() - logprobs_N", OBJECTIVES),
    ("objectives/kl.py", "return logprobs_N - ref_logprobs_N.detach()", "return logprobs_N - ref_logprobs_N", OBJECTIVES),
    ("objectives/kl.py", "difference_N = -kl_k1", "difference_N = kl_k1", OBJECTIVES),
    ("objectives/kl.py", "\"k1\": kl_k1,", "\"k1\": kl_k3,", OBJECTIVES),
    ("objectives/kl.py", "return 0.5 * kl_k1", "return kl_k1", OBJECTIVES),
    ("objectives/kl.py", "(1 + error * num_completions / horizon)", "(1 - error * num_completions / horizon)", OBJECTIVES),
    ("objectives/kl.py", "min(max(kl / target - 1, -0.2), 0.2)", "kl / target - 1", OBJECTIVES),
    ("objectives/aggregate.py", "if reduction != \"sequence\":", "if reduction not in (\"sequence\", \"sum\"):", OBJECTIVES),
    ("objectives/value.py", "gamma * lam * sums_TS[time + 1]", "gamma * sums_TS[time + 1]", VALUE),
    ("objectives/value.py", "gamma * next_values_N - values", "gamma * next_values_N + values", VALUE),
    ("objectives/value.py", "is_clipped_N = near_losses_N > losses_N", "is_clipped_N = near_losses_N < losses_N", VALUE),
    ("objectives/aggregate.py", " / lengths_S.clamp(min=1)", "", OBJECTIVES),
    ("objectives/advantages.py", "(r - mean) / by", "(mean - r) / by", ADVANTAGES),
    ("objectives/advantages.py", "/ (len(values) - 1))", "/ len(values))", ADVANTAGES),
    ("objectives/advantages.py", "(len(values) - 1) / len(values) *", "len(values) / (len(values) - 1) *", ADVANTAGES),
    ("objectives/advantages.py", "math.fsum(values) / len(values) + eps", "math.fsum(values) + eps", ADVANTAGES),
    ("objectives/advantages.py", "count = sum(n for _, n in known)", "count = len(known)", ADVANTAGES),
    ("objectives/advantages.py", "None if r is None else r - x", "None if r is None else r + x", ADVANTAGES),
    ("objectives/advantages.py", "accumulate(reversed(tokens)))[::-1]", "accumulate(tokens))", ADVANTAGES),
    ("objectives/advantages.py", "[group_advantages(rows, eps=eps) for rows in criteria]", "[group_advantages(rows, scale=\"none\") for rows in criteria]", ADVANTAGES),
    ("objectives/advantages.py", "if scale == \"group\" else batch_std) + eps", "if scale == \"group\" else _std(values)) + eps", ADVANTAGES),
    ("objectives/advantages.py", "_known(r.totals, group_advantages(r.totals, scale=\"none\"))", "r.totals", ADVANTAGES),
    # trainers
    ("training/step.py", "return max(self.count, 1.0)", "return 7.0", TRAINERS),
    ("training/step.py", "total -= 1", "pass", "test_packing.py"),
    ("training/optimizers.py", " or hasattr(cls, \"eval\")", "", TRAINERS),
    ("stages/policy_gradient.py", "PolicyTerms(ratios_N, advantages_N", "PolicyTerms(ratios_N, -advantages_N", GRADIENT),
    ("stages/policy_gradient.py", "losses_N = losses_N + step.kl_coef", "losses_N = losses_N - step.kl_coef", GRADIENT),
    ("stages/policy_gradient.py", "corrected = args.kl_estimator != \"k2\"", "corrected = args.kl_estimator == \"k2\"", GRADIENT),
    ("stages/policy_gradient.py", "return float(sequences * self.args.max_completion_length)", "return float(sequences)", GRADIENT),
    ("stages/policy_gradient.py", "value = value - step.entropy_coef", "value = value + step.entropy_coef", GRADIENT),
    ("stages/policy_gradient.py", "(entropy_N * kept_N).sum()", "entropy_N.sum()", GRADIENT),
    ("stages/policy_gradient.py", "num_tokens = max(ranks.sum(float(sum(map(scored_tokens, kept)))), 1.0)", "pass", GRADIENT),
    ("stages/policy_gradient.py", "losses_N * kept_N * (", "losses_N * (", GRADIENT),
    ("stages/policy_gradient.py", "quantile = 1 - self.args.top_entropy_quantile", "quantile = self.args.top_entropy_quantile", GRADIENT),
    ("stages/policy_gradient.py", "losses_N = losses_N * correction_N", "pass", GRADIENT),
    ("stages/policy_gradient.py", "minimum=args.sampling_correction_min", "minimum=None", GRADIENT),
    ("stages/policy_gradient.py", "logprobs_N.detach() if old_N is None else torch.where(old_N.isnan(), logprobs_N.detach(), old_N)", "logprobs_N.detach()", GRADIENT),
    ("stages/policy_gradient.py", "level=args.importance_sampling_level", "level=\"token\"", GRADIENT),
    ("stages/policy_gradient.py", "return None if self.reward is None else self.reward - sum", "return None if self.reward is None else self.reward + sum", RECORDS),
    ("stages/policy_gradient.py", "if estimator == \"batch\" and any(", "if any(", RECORDS),
    ("stages/policy_gradient.py", "totals=[[r.total for r in row] for row in table]", "totals=[[r.reward for r in row] for row in table]", RECORDS),
    ("stages/policy_gradient.py", "else min(max(reward, clip[0]), clip[1])", "else reward", RLOO),
    ("training/kl_penalty.py", "self._next = adapted_beta(", "self.coefficient = self._next = adapted_beta(", BETA),
    ("stages/sampler.py", "        self._check(groups)\n", "", "test_policy_trainer.py"),
    ("stages/policy_gradient.py", "[self.kl.coefficient * value for value in completion.scored(kl)]", "[-self.kl.coefficient * value for value in completion.scored(kl)]", RLOO),
    ("training/kl_penalty.py", "KL_ESTIMATORS[self._args.kl_estimator]", "KL_ESTIMATORS[\"k3\"]", RLOO),
    ("stages/policy_gradient.py", "return wanted and (", "return False and (", "test_policy_trainer.py::test_the_divergence_in_the_reward_does_not_depend_on_what_an_engine_tells"),
    ("stages/policy_gradient.py", "always = kl_coef > 0 or bonus.is_on", "always = kl_coef > 0", "test_policy_trainer.py::test_a_group_without_spread_keeps_its_entropy_bonus"),
    ("stages/policy_gradient.py", "{True: \"group\", False: \"none\"}", "{True: \"none\", False: \"group\"}", "test_policy_trainer.py::test_trl_s_booleans_of_scale_rewards"),
    ("training/reward_funcs.py", "args.overlong_penalty * value", "-args.overlong_penalty * value", "test_policy_trainer.py::test_overlong_completions_lose_reward_after_the_filter"),
    ("stages/sampler.py", "index=shard.position", "index=shard.group.index", "test_policy_trainer.py::test_refills_draw_new_samples_of_a_prompt_that_comes_again"),
    ("stages/online.py", "later = [group for step in steps[1:] for group in step]", "later = list(groups)", "test_policy_trainer.py::test_fresh_samples_cost_no_forward_of_their_own"),
    ("stages/online.py", "        self.algorithm.load_state_dict(state.algorithm)\n", "", "test_policy_trainer.py::test_resumed_is_uninterrupted"),
    ("stages/online.py", "= state.rollouts, state.rounds\n", "= 0, 0\n", "test_policy_trainer.py::test_resumed_is_uninterrupted"),
    ("stages/sampler.py", "        run.num_tokens += sum(group.num_tokens for group in groups)\n", "", "test_policy_trainer.py::test_num_tokens_are_those_sampled_however_often_they_are_trained_on"),
    ("rollout/dynamic_sampling.py", "(good if has_reward_variance(group) else flat)", "(flat if has_reward_variance(group) else good)", ROUNDS),
    ("rollout/dynamic_sampling.py", "max(known) > min(known)", "max(known) >= min(known)", ROUNDS),
    ("rollout/dynamic_sampling.py", "old = completion.policy_logprobs or completion.token.get(\"old_logprobs\") or completion.sampler_logprobs", "old = None", ROUNDS),
    ("rollout/dynamic_sampling.py", "key=lambda p: (-stdev(", "key=lambda p: (stdev(", ROUNDS),
    ("rollout/dynamic_sampling.py", "self.groups.pop(position)", "self.groups[position]", ROUNDS),
    ("rollout/dynamic_sampling.py", "sorted(self.groups)[: max(", "sorted(self.groups, reverse=True)[: max(", ROUNDS),
    ("rollout/dynamic_sampling.py", "_copy(group) for position", "group for position", ROUNDS),
    ("rollout/dynamic_sampling.py", "int(-(-number // multiple) * multiple)", "int(number)", ROUNDS),
    ("rollout/prompts.py", "if mean_reward > self._target else", "if mean_reward < self._target else", PROMPTS),
    ("rollout/prompts.py", "key=lambda i: difficulties[i]", "key=lambda i: -difficulties[i]", PROMPTS),
    ("rollout/prompts.py", "random.Random(f\"{self._seed} {position}\")", "random.Random(f\"{self._seed}\")", PROMPTS),
    ("rollout/prompts.py", "manual_seed(self._seed + epoch)", "manual_seed(self._seed)", PROMPTS),
    ("rollout/prompts.py", "Shard(position, low, part)", "Shard(position, 0, part)", PROMPTS),
    ("stages/algorithm.py", "masked = self.args.mask_truncated_completions and", "masked = self.args.mask_truncated_completions and not", TRAINERS),
    ("stages/algorithm.py", "completion.reward is not None and not masked", "not masked", TRAINERS),
    ("training/logprobs.py", "score(model, batch, temperature=args.temperature).logprobs", "score(model, batch).logprobs", GRADIENT),
    ("training/sampler_check.py", "logprobs_N - sampled_logprobs_N, 0.0", "sampled_logprobs_N - logprobs_N, 0.0", TRAINERS),
    ("training/sampler_check.py", "and difference / count <= self.mean_bound", "", TRAINERS),
    ("training/sampler_check.py", "clamp(-_CLIP_NATS, _CLIP_NATS)", "clamp(-9, 9)", TRAINERS),
    ("training/sampler_check.py", "self._window.popleft()", "break", TRAINERS),
    # the critic
    ("objectives/value.py", "rewards + gamma * next_values_N - values", "rewards + next_values_N - values", VALUE),
    ("objectives/value.py", "gamma * lam * sums_TS[time + 1]", "lam * sums_TS[time + 1]", VALUE),
    ("objectives/value.py", "torch.where(is_last_N, after_S[sequence_index_N], values.roll(-1))", "values.roll(-1)", VALUE),
    ("objectives/value.py", "(advantages_N + values).to", "(advantages_N - values).to", VALUE),
    ("objectives/value.py", "torch.where(is_clipped_N, near_losses_N, losses_N)", "torch.where(is_clipped_N, losses_N, near_losses_N)", VALUE),
    ("objectives/value.py", "old_values_N + clip), old_values_N - clip)", "old_values_N + clip), old_values_N - 2 * clip)", VALUE),
    ("objectives/value.py", "0.0) / (count - 1)", "0.0) / count", VALUE),
    ("objectives/value.py", "- (total / count) ** 2", "", VALUE),
    ("objectives/value.py", "left_S = rewards_S - torch", "left_S = rewards_S + torch", VALUE),
    ("objectives/value.py", "rewards_N = early_N + torch.where", "rewards_N = torch.where", VALUE),
    ("stages/actor_critic.py", "placed[end - 1] += reward", "placed[-1] += reward", AGENTS),
    ("stages/actor_critic.py", "        if self.args.turn_credit:\n", "        if True:\n", AGENTS),
    ("stages/actor_critic.py", "else (reward, *self._turn_rewards(completion))", "else (reward,)", AGENTS),
    ("stages/policy_gradient.py", "return (reward, *self._turn_rewards(completion))", "return (reward,)", AGENTS),
    ("model/packing.py", "values[j] = next(rest)", "values[j - 1] = next(rest)", "test_packing.py"),
    ("model/critic.py", "        model = copy.deepcopy(model)\n", "", CRITIC),
    ("model/critic.py", "copy_modules(policy).unload()", "copy.deepcopy(policy).unload()", CRITIC),
    ("model/critic.py", "    if trained:\n", "    if False:\n", CRITIC),
    ("model/critic.py", "value = exact.pop(parameter, parameter.data)", "value = parameter.data", CRITIC),
    ("model/critic.py", "    classifier.score.register_forward_pre_hook(widen)\n", "", CRITIC),
    ("training/critic.py", "scale = vf_coef * self._ranks / max(count, 1.0)", "scale = vf_coef / max(count, 1.0)", CRITIC),
    ("training/critic.py", "scale = vf_coef * self._ranks", "scale = self._ranks", CRITIC),
    ("training/critic.py", "moments(returns_N - old_N)", "moments(returns_N - values_N)", CRITIC),
    ("training/critic.py", "self.learning_rate * lr_factor", "self.learning_rate", CRITIC),
    ("training/critic.py", "            parameter.copy_(weights[name])\n", "            pass\n", CRITIC),
    ("training/critic.py", "            self.optimizer.zero_grad(set_to_none=True)\n", "", CRITIC),
    ("training/critic.py", "self.optimizer.load_state_dict(dict(state[\"optimizer\"]))", "pass", CRITIC),
    ("training/critic.py", "        self.model.train()\n", "", CRITIC),
    ("training/critic.py", "if not math.isfinite(norm):", "if False:", CRITIC),
    # numbers
    ("model/masters.py", "return noise.mul_((weights != 0)", "return noise.mul_((weights != weights)", MASTERS),
    ("model/masters.py", "noise.mul_((weights != 0)", "noise.mul_((weights == weights)", MASTERS),
    ("model/masters.py", "self._view(number).add_(gradient)", "self._view(number).copy_(gradient)", MASTERS),
    ("model/masters.py", "            self._flat = self._flat.to(torch.float32)\n            self", "            self", MASTERS),
    ("model/masters.py", "            self.rest.copy_(rest)\n", "", MASTERS),
    ("model/masters.py", "bits.add_(0x8000)", "bits.add_(0)", MASTERS),
    ("model/masters.py", "nan_to_num_(nan=math.nan", "nan_to_num_(nan=0.0", MASTERS),
    ("model/masters.py", "grad.mul_(scale.to(", "grad.mul_(torch.ones_like(scale).to(", MASTERS),
    ("model/masters.py", "saved != self.sum_of_bits()", "False", MASTERS),
    ("model/masters.py", "if rests.any() and", "if", MASTERS),
    ("model/masters.py", "clamp_(max=0x7FFF)", "clamp_(max=0x8000)", MASTERS),
    # packing, scoring, head
    ("model/packing.py", "positions += range(prompt_length, prompt_length + length)", "positions += range(length)", SCORING),
    ("model/packing.py", "else prompt_start + prompt_length - 1 for j in scored", "else start for j in scored", SCORING),
    ("model/scoring.py", "torch.ones_like(batch.input_ids),", "None,", SCORING),
    ("model/prefix.py", "positions[query] - positions[key] < rule.window", "positions[query] - positions[key] <= rule.window", "test_attention.py"),
    ("model/prefix.py", "torch.tanh(scores / softcap)", "torch.tanh(scores)", SCORING),
    ("model/tiled_head.py", "return self.spec.scale / self.temperature", "return self.spec.scale * self.temperature", HEAD),
    ("model/tiled_head.py", ".square_().neg_().add_(1)", ".square_().add_(1)", HEAD),
    ("model/tiled_head.py", "picked_N == max_N", "picked_N <= max_N", HEAD),
    ("model/tiled_head.py", "decay.square() * square_N[rows]", "decay * square_N[rows]", HEAD),
    ("model/scoring.py", "span.prompt[1] + span.completions[0][1]", "span.completions[0][1]", SCORING),
    # supervised fine-tuning
    ("training/learner.py", "self.neftune_noise_alpha = None", "pass", SFT),
    ("training/learner.py", "if \"loss\" in logs:", "if True:", SFT),
    # preferences
    ("objectives/preference.py", "return self.chosen - self.ref_chosen", "return self.ref_chosen - self.chosen", "test_objectives_preference.py"),
    ("objectives/preference.py", "eps * F.logsigmoid(-margin_P)) / (1 - 2 * eps)", "eps * F.logsigmoid(-margin_P))", "test_objectives_preference.py"),
    ("stages/dpo.py", "if loss.per_token else step.denominator)", "if not loss.per_token else step.denominator)", "test_preference_trainer.py"),
    ("stages/kto.py", "before = [groups[-1], *groups[:-1]]", "before = list(groups)", "test_preference_trainer.py"),
    ("stages/preference.py", "    whole_groups = True", "    whole_groups = False", "test_preference_trainer.py"),
    ("stages/dpo.py", "shorter_S[batch.sequence_index], 1.0, float(self.args.ld_alpha))", "shorter_S[batch.sequence_index], float(self.args.ld_alpha), 1.0)", "test_preference_trainer.py"),
    ("training/sequence_scores.py", "moved=lambda: [known.clear() for known in self.known.values()]", "moved=lambda: None", "test_preference_trainer.py"),
    ("training/reference_sums.py", "or cast(\"dict[str, Any]\", stored).get(\"key\") != key", "", "test_preference_trainer.py"),
    ("stages/online_dpo.py", "completions=[best[1], worst[1]]", "completions=[worst[1], best[1]]", "test_online_dpo.py"),
    ("training/checkpoint.py", "int(own[\"num_tokens\"]) if own and trainer.is_world_process_zero() else 0", "0", SFT),
    ("training/stream.py", "if once:", "if True:", SFT),
    ("data/limits.py", "num_cut - len(group.prompt_ids)", "num_cut", "test_data.py"),
    ("data/limits.py", "position > 0 and (mask is None or mask[position])", "mask is None or mask[place]", "test_data.py"),
    # checkpoints: of one run, whole, and found
    ("training/checkpoint.py", "            check_unused(folder)\n", "            pass\n", "test_checkpoints.py::test_a_new_run_does_not_mix_with_the_checkpoints_of_another"),
    ("training/checkpoint.py", "trainer.ranks.agreed(lambda: set_aside_after(Path(args.output_dir), step))", "pass", "test_checkpoints.py::test_going_back_sets_the_later_checkpoints_aside"),
    ("training/fingerprint.py", "if problems := list(_differences(before, now)):", "if problems := []:", "test_checkpoints.py::test_another_run_is_refused_with_what_differs"),
    ("training/checkpoint.py", "_check_masters(checkpoint, trainer.master_weights is not None)", "pass", "test_checkpoints.py::test_another_dtype_is_refused_with_and_without_a_record"),
    ("training/checkpoint.py", "scheduler.load_state_dict(state)", "pass", "test_checkpoints.py::test_learning_rate_and_schedule_take_effect"),
    ("training/checkpoint.py", "group.update({key: own[key] for key in wanted & own.keys()})", "pass", "test_checkpoints.py::test_learning_rate_and_schedule_take_effect"),
    ("training/fingerprint.py", "digest.update(_group_bytes(rows[number]))", "pass", "test_checkpoints.py::test_another_run_is_refused_with_what_differs"),
    ("training/learner.py", "if self.state.global_step >= self.state.max_steps:", "if False:", "test_checkpoints.py::test_a_run_at_its_last_step_takes_no_other"),
    ("runs/checkpoints.py", "if (problem := _broken_seal(checkpoint)) is not None:", "if problem := None:", "test_checkpoints.py::test_a_broken_checkpoint_is_not_resumed_and_the_one_before_is"),
    ("runs/checkpoints.py", "        if _is_sealed(draft):\n            _move_in(draft, folder)\n", "        pass\n", "test_checkpoints.py::test_a_kill_between_any_two_operations_leaves_one_whole_checkpoint"),
    ("runs/checkpoints.py", "if path not in protected", "if True", "test_checkpoints.py::test_the_best_checkpoint_is_kept_and_named"),
    ("training/reference.py", "weights.copy_(saved[name])", "pass", "test_checkpoints.py::test_a_moved_reference_is_restored_to_the_bit"),
    ("training/rollout_state.py", "if len(files) != world and (not states or any(state[\"buffer\"] for state in states)):", "if not files:", "test_checkpoints.py::test_samples_in_flight_stay_with_their_processes"),
    ("training/rollout_state.py", "completions, rows[values[\"index\"]],", "completions, {},", "test_checkpoints.py::test_rows_of_any_kind_stay_in_the_data_set"),
    ("model/finite.py", "if not flag]", "if False]", "test_finite.py"),
    # what is trained, and with what
    ("training/model_state.py", "owner.release()", "pass", "test_chaining.py"),
    ("model/adapters.py", "parameter.requires_grad_(trains)", "pass", "test_chaining.py::test_frozen_weights_do_not_move"),
    ("training/optimizers.py", "if id(parameter) not in held]", "if False]", "test_chaining.py::test_an_optimizer_over_other_weights_is_refused"),
    ("data/tokens.py", "skip_special_tokens=False", "skip_special_tokens=True", "test_special_tokens.py"),
    ("model/loading.py", "    tokenizer.chat_template = template\n", "    pass\n", "test_chat_templates.py"),
    ("data/traces.py", "raise _no_trace(f\"the key", "_no_trace(f\"the key", "test_data_traces.py"),
    ("rewards/rubric.py", "if group.row[name] is not None:", "if False:", "test_rewards_rubric.py"),
    ("data/sources.py", "if not isinstance(rows, Sized):", "if False:", "test_endless_data.py"),
    # a run without a learning signal says so
    ("training/learning_signal.py", "if stops and self.dead_steps >= self.limit:", "if False:", "test_learning_signal.py"),
    ("training/learning_signal.py", "if all(outcome.is_masked or outcome.rewards is None for outcome in outcomes):", "if False:", "test_learning_signal.py"),
    ("training/transcripts.py", "\"answers\": {} if score is None else score.answers", "\"answers\": {}", "test_learning_signal.py"),
    ("training/transcripts.py", "\"advantage\": advantage", "\"advantage\": None", "test_transcripts.py"),
    ("rollout/validation.py", "if not (math.isfinite(value) and value <= _ROUNDING_NATS):", "if value > _ROUNDING_NATS:", "test_validation.py"),
    ("rollout/decoding.py", "if bool(absent.any()) and not bool(absent.all()) else None", "if False else None", "test_model_limits.py"),
    # records, processes and signals
    ("runs/records.py", "return own <= step if step else", "return True if step else", "test_records.py"),
    ("runs/files.py", "if stream.tell() and not _ends_a_line(stream):", "if False:", "test_runs_files.py"),
    ("runs/files.py", "return text if _is_encodable(text) else", "return text if True else", "test_runs_files.py"),
    ("training/signals.py", "control.should_save = control.should_training_stop = True", "pass", "test_processes.py"),
    ("training/signals.py", "signal.getsignal(number) is signal.SIG_DFL", "True", "test_processes.py"),
    ("training/processes.py", "if launched > 1 and args.world_size == 1:", "if False:", "test_processes.py"),
    ("runs/lock.py", "fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", "test_processes.py"),
    # what a model writes is not run, and what a reward does is contained
    ("errors.py", "if isinstance(error, Exception):\n        return error\n    return kind(", "if True:\n        return error\n    return kind(", "test_rewards_calls.py"),
    ("rewards/calls.py", "            raise _Overdue\n", "            pass\n", "test_rewards_calls.py::test_a_function_over_its_time_is_interrupted_and_pinned_on_its_completion"),
    ("rewards/pool.py", "env=kept | private | threads |", "env=dict(os.environ) | private | threads |", "test_rewards_isolation.py"),
    ("rewards/pool.py", "cast(\"dict[str, Any]\", reply).get(\"nonce\") == nonce", "True", "test_rewards_isolation.py::test_a_reply_cannot_be_forged_by_writing_to_descriptors"),
    ("rewards/pool.py", "_kill_marked(f\"{_MARK}={self._mark}\".encode())", "pass", "test_rewards_isolation.py"),
    ("rewards/equality.py", "digits = _SPARE_DIGITS + sum(", "digits = 15 + 0 * sum(", "test_math_verifier.py"),
    ("rewards/equality.py", "if len(gold.items) != len(answer.items) or", "if", "test_math_verifier.py"),
    ("rewards/equality.py", "roots = not has_sizes and _needs_positive(gold)", "roots = _needs_positive(gold)", "test_math_verifier.py"),
    ("rewards/grading.py", "if _is_statement(gold) or _is_statement(answer) or _structure(gold) != _structure(answer):", "if False:", "test_math_verifier.py"),
    ("rewards/grading.py", "if spelling and spelling == _spelling(gold):", "if False:", "test_math_verifier.py"),
    ("rewards/values.py", "slope < 0 else (-sympy.oo, end)", "slope > 0 else (-sympy.oo, end)", "test_math_verifier.py"),
    ("rewards/values.py", "gap > 0.01 *", "gap > 100 *", "test_math_verifier.py"),
    ("rewards/powers.py", "and exponent.q % 2 == 1:\n        return (-1) ** exponent.p * _product", "and exponent.q % 2 == 1:\n        return _product", POWERS),
    ("rewards/powers.py", "totals[atom] = totals.get(atom, 0) + count", "totals[atom] = count", POWERS),
    ("rewards/powers.py", "*_primes(int(base.q), -1)]", "*_primes(int(base.q), 1)]", POWERS),
    ("rewards/powers.py", "product, place = atom ** (digit + rest), 1", "product, place = atom**digit, 1", POWERS),
    ("rewards/powers.py", "        place *= _STEP\n", "", POWERS),
    ("rewards/powers.py", "return base * between if near <= number else base / between", "return base * between", POWERS),
    ("rewards/powers.py", "return power(number, exponent) * rest**exponent", "return rest**exponent", POWERS),
    ("rewards/powers.py", "sympy.Pow: power,", "sympy.Pow: lambda base, exponent: base,", POWERS),
    ("rewards/powers.py", "and (known := _POWER.fullmatch(base.name))", "and (known := None)", POWERS),
    ("rewards/equality.py", "            return False  # equal at all points is then not equal\n", "            pass\n", POWERS),
    ("rewards/equality.py", "collected(gold / answer) == 1", "False", POWERS),
    ("rewards/grading.py", "        if _has_giants(theirs):", "        if False:", POWERS),
    ("rewards/values.py", "and variables(last) and not variables(first)", "and not variables(first)", POWERS),
    ("rewards/rubric.py", "isinstance(v, Exception) else float(v) for v", "isinstance(v, Exception) else v for v", AGENTS),
    ("rewards/notation.py", "not _DOUBT.search(lead[0])", "True", "test_math_verifier.py"),
    ("rewards/mathematics.py", "raise Unreadable(\"two numbers in a row\")\n                value", "pass\n                value", "test_math_verifier.py"),
    ("rewards/commands.py", "argument = argument.subs(unit_symbol(\"degree\"), sympy.pi / 180)", "pass", "test_math_verifier.py"),
    ("rewards/guard.py", "return file.startswith(\"<\") and not file.startswith(\"<frozen \") and not _is_by_library()", "return False", "test_rewards_isolation.py"),
    # pairs, held-out losses and pipelines
    ("evaluation/pairs.py", "value != worst[\"criteria\"].get(name)", "value == worst[\"criteria\"].get(name)", "test_pairs.py"),
    ("evaluation/pairs.py", "right[problem].append(float(value > 0))", "right[problem].append(float(value >= 0))", "test_pairs.py"),
    ("evaluation/pairs.py", "(1 - wins_M) ** 2", "wins_M ** 2", "test_pairs.py"),
    ("evaluation/evaluate.py", "(-sums_S / tokens_S)", "(-sums_S)", "test_evaluate.py"),
    ("evaluation/evaluate.py", "if name != \"completion\"}", "if name}", "test_evaluate.py"),
    ("cli/pipeline.py", "if name == \"reward\":", "if name == \"none\":", "test_pipeline.py"),
    ("cli/pipeline.py", "return disjoint(data.train, data.held_out)[0]", "return data.train + data.held_out", "test_pipeline.py"),
    ("progress.py", "self._total - completed", "self._total", "test_progress.py"),
    ("training/callbacks.py", "control.should_log = True", "pass", "test_callbacks.py"),
    ("training/environment.py", "Version(found[name]).release >", "Version(found[name]) >", "test_callbacks.py"),
    ("cli/output.py", "if not any(", "if any(", "test_first_impression.py::test_only_known_remarks_are_silenced"),
    ("report/page.py", "(difference.mean > 0) != (comparison", "(difference.mean > 0) == (comparison", "test_report.py"),
    # adapters
    ("model/quantization.py", "cast(\"Any\", module).support_avx512bf16_for_cpu = False", "pass", "test_adapters.py"),
    ("model/adapters.py", "torch.default_generator.manual_seed(seed)", "pass", "test_adapters.py"),
    ("training/reference.py", "if _trains_adapters_only(policy) and _adapters_change_nothing(policy):", "if _adapters_change_nothing(policy):", "test_adapters.py"),
    ("training/reference.py", "if _trains_adapters_only(policy) and _adapters_change_nothing(policy):", "if _trains_adapters_only(policy):", "test_adapters.py"),
    # rollouts
    ("rollout/sampling.py", "for word in (seed, step, index, sample):", "for word in (seed, index, sample):", "test_sampling.py"),
    ("rollout/decoding.py", "request.first_sample + sample)", "sample)", NATIVE),
)  # fmt: skip


_HANGS_SECONDS = 900.0


def cannot_be_made(mutation: tuple[str, str, str, str]) -> str | None:
    """Why a line of MUTATIONS fits the sources no more, or None: code moves, and the line must move with it."""
    name, old, _, tests = mutation
    file, test = ROOT / "src" / "burnish" / name, ROOT / "tests" / tests.partition("::")[0]
    if not file.is_file() or not test.is_file():
        return f"{name}, {tests}: no such file"
    if (count := file.read_text().count(old)) != 1:
        return f"{name}: {old!r} stands there {count} times"
    if (function := tests.partition("::")[2]) and f"def {function}(" not in test.read_text():
        return f"{tests}: no such test"
    return None


def survives(mutation: tuple[str, str, str, str]) -> str | None:
    """What to say of a mutation that no test noticed, or that could not be made."""
    name, old, new, tests = mutation
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "src", Path(folder) / "src")
        if (problem := cannot_be_made(mutation)) is not None:
            return problem
        file = Path(folder) / "src" / "burnish" / name
        file.write_text(file.read_text().replace(old, new))
        environment = {**os.environ, "PYTHONPATH": str(Path(folder) / "src"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{tests}"]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=_HANGS_SECONDS
            )
        except subprocess.TimeoutExpired:
            return None  # the mutated code waits for what never comes, and no test passes
        if done.returncode == 1:
            return None
        return f"{name}: {old!r} -> {new!r} survives {tests} (exit {done.returncode})"


def main() -> None:
    """All of them, or those that the words on the command line pick, two at a time."""
    words = sys.argv[1:]
    chosen = [m for m in MUTATIONS if not words or any(word in text for word in words for text in m)]
    survivors: list[str | None] = []
    with ThreadPoolExecutor(2) as pool:
        for number, survivor in enumerate(pool.map(survives, chosen), 1):
            print(f"{number}/{len(chosen)} {survivor or 'caught'}", flush=True)
            survivors.append(survivor)
    if any(survivors):
        raise SystemExit(f"{sum(s is not None for s in survivors)} mutations survive")


if __name__ == "__main__":
    main()
