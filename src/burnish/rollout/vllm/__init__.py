"""Rollouts by vLLM servers."""

from burnish.rollout.vllm.client import Deadlines
from burnish.rollout.vllm.engine import VLLMServerEngine
from burnish.rollout.vllm.pool import ServerPool

__all__ = ["Deadlines", "ServerPool", "VLLMServerEngine"]
