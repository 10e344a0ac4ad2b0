"""Rollouts by vLLM, in servers or in the trainer's process."""

from burnish.rollout.vllm.client import Deadlines
from burnish.rollout.vllm.colocated import VLLMColocatedEngine
from burnish.rollout.vllm.embedded import EmbeddedLLM, EmbeddedOptions, check_embedding
from burnish.rollout.vllm.engine import VLLMServerEngine
from burnish.rollout.vllm.pool import ServerPool

__all__ = [
    "Deadlines",
    "EmbeddedLLM",
    "EmbeddedOptions",
    "ServerPool",
    "VLLMColocatedEngine",
    "VLLMServerEngine",
    "check_embedding",
]
