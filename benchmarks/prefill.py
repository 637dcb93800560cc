"""Prefill with a plan over prefill without, beside the ratio that the FLOPs allow; CPU or GPU.

    python -m benchmarks.prefill                 # a small geometry, minutes on two cores
    python -m benchmarks.prefill --json out.json

Random weights: time depends on shapes only. Dense and plans take turns within each round, so the
ratios hold on a machine whose speed drifts; absolute times do not. The empty plan is measured
against the model as transformers ships it.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import adsc

BUDGETS = (1 / 3, 2 / 9, 1 / 9)  # the field's 192, 128 and 64 of 576


def build(width: int, layers: int, side: int) -> LlavaForConditionalGeneration:
    """A LLaVA with a small tower, so that the decoder is what is timed."""
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=14 * side,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=1000,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=2048,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=999,
        image_seq_length=side * side,
        vision_feature_layer=-2,
    )
    return LlavaForConditionalGeneration(config).eval()


def measure(
    model: LlavaForConditionalGeneration,
    inputs: dict[str, torch.Tensor],
    plans: dict[str, adsc.PruningPlan | None],
    rounds: int,
) -> dict[str, list[float]]:
    """Seconds of a prefill under each plan, None being the model without hooks, in each round.

    Each timed call follows an untimed one under the same plan; the first round is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in plans}
    for turn in range(rounds + 1):
        for name, plan in plans.items():
            adsc.detach(model)
            if plan is not None:
                adsc.attach(model, plan)
            with torch.inference_mode():
                for timed in (False, True):
                    start = time.perf_counter()
                    model(**inputs, use_cache=True, logits_to_keep=1)
                    if torch.cuda.is_available():
                        torch.cuda.synchronize()
                    if timed and turn:
                        times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--width", type=int, default=512, help="decoder width")
    parser.add_argument("--layers", type=int, default=12, help="decoder layers")
    parser.add_argument(
        "--side", type=int, default=24, help="vision tokens per side of the picture"
    )
    parser.add_argument("--text", type=int, default=101, help="text tokens")
    parser.add_argument("--batch", type=int, default=2, help="rows")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(options.width, options.layers, options.side).to(device)
    vision = options.side**2
    ids = torch.randint(0, 998, (options.batch, vision + options.text))
    ids[:, 5 : 5 + vision] = 999
    pixels = torch.randn(options.batch, 3, 14 * options.side, 14 * options.side)
    inputs = {"input_ids": ids.to(device), "pixel_values": pixels.to(device)}

    plans = {"empty plan": adsc.PruningPlan()}
    for share in BUDGETS:
        average = share * vision
        best = adsc.solve_plans(options.layers, vision, average, drops=2, keep=0.25, tolerance=0.1)
        plans[f"average {average:.0f}"] = best[0]

    times = measure(model, inputs, {"dense": None, **plans}, options.rounds)
    dense_cost = adsc.estimate_cost(model.config, "", text_tokens=options.text)
    rows = []
    for name, plan in plans.items():
        ratios = [a / b for a, b in zip(times["dense"], times[name], strict=True)]
        cost = adsc.estimate_cost(model.config, plan, text_tokens=options.text)
        bound = dense_cost.flops / cost.flops
        speedup = statistics.median(ratios)
        rows.append(
            {
                "case": name,
                "plan": str(plan),
                "speedup": speedup,
                "low": min(ratios),
                "high": max(ratios),
                "bound": bound,
                "of_bound": speedup / bound,
            }
        )
    print(
        f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads, {vars(options)}"
    )
    print(f"{'case':<14}{'plan':<22}{'speed-up':>9}{'low':>7}{'high':>7}{'bound':>7}{'share':>7}")
    for row in rows:
        print(
            f"{row['case']:<14}{row['plan'] or '-':<22}{row['speedup']:>9.2f}{row['low']:>7.2f}"
            f"{row['high']:>7.2f}{row['bound']:>7.2f}{row['of_bound']:>7.2f}"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
