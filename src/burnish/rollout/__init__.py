"""Rollouts: the Engine protocol and the engines that sample completions."""

from burnish.rollout.engine import Engine, Request, SamplingParams, eos_token_ids
from burnish.rollout.engines import make_engine
from burnish.rollout.native import NativeEngine

__all__ = ["Engine", "NativeEngine", "Request", "SamplingParams", "eos_token_ids", "make_engine"]
