"""Run by test_mesh on eight simulated devices: the embedded model's answers by an engine of four groups, as JSON."""

import dataclasses
import json

import jax
from jax.sharding import Mesh

import tarsier_jax
from eval.shapes.annotations import GROUNDED_PROMPT, VIDEO_PROMPT, user_turn
from eval.shapes.clips import draw_clips
from infer.engine import Completion, Engine, EngineConfig, Request, fit_config
from tarsier_jax.generation.sampling import SamplingOptions
from tarsier_jax.processing.batch import Example
from tarsier_jax.processing.processor import Processor
from tarsier_jax.programs import Compilations
from tarsier_jax.sharding import make_mesh
from tarsier_jax.weights import EMBEDDED

CLIPS, TOKENS = 14, 24


def examples(processor: Processor) -> list[Example]:
    """Of mixed sizes, lengths and prompts."""
    clips = [*draw_clips(0, CLIPS // 2), *draw_clips(0, CLIPS // 2, other=True)]
    asked = [user_turn(clip.video, (VIDEO_PROMPT, GROUNDED_PROMPT)[i % 2]) for i, clip in enumerate(clips)]
    return [processor({"messages": [message]}) for message in asked]


def config(processor: Processor, mesh: Mesh | None = None) -> EngineConfig:
    config = fit_config(processor, 8, TOKENS, mesh)
    return dataclasses.replace(config, buckets=config.buckets[::5])  # two kinds of six, as each is compiled


def answers(engine: Engine) -> list[list[int]]:
    requests = [Request(i, e, SamplingOptions(8 + i % 17)) for i, e in enumerate(examples(engine.processor))]
    got = {answer.request.key: answer.tokens for answer in engine.run(requests) if isinstance(answer, Completion)}
    return [got[i] for i in range(CLIPS)]


def main() -> None:
    jax.config.update("jax_default_matmul_precision", "highest")
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    model, processor = tarsier_jax.load(EMBEDDED, dtype="float32", mesh=mesh)
    engine = Engine(model, processor, dataclasses.replace(config(processor, mesh), reuse_prefixes=True))
    with Compilations() as compilations:
        told = answers(engine)
        again = answers(engine)
    reused = engine.stats.reused_tokens
    print(json.dumps({"answers": told, "again": again, "reused": reused, "compilations": compilations.count}))


if __name__ == "__main__":
    main()
