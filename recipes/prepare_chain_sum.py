"""Make the chain-sum task: a tiny Qwen3-shaped model, warmed up by supervision, and its problems.

    python recipes/prepare_chain_sum.py --out .cache/chain_sum --seed 0

The task: `3+5+8=` is to be answered `3+5=8;8+8=16;#16`. Chains have 2 to 14 operands, short ones
being more frequent, so that answers have a long tail of lengths and long ones are harder. The warm start
stops once greedy accuracy on problems of its own reaches `--target`, which leaves room for
reinforcement learning on both sides. OUT gets `model/`, `train.jsonl` and `eval.jsonl` (held out).
Everything is drawn from the seed; a finished OUT is left as it is.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

MIN_OPERANDS, MAX_OPERANDS, MEAN_OPERANDS = 2, 14, 5.0
NUM_TRAIN, NUM_EVAL, NUM_VALIDATION = 4096, 256, 256
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
VOCABULARY = [PAD, BOS, EOS, *"0123456789+=;#"]


def short_chains_mostly(rng: random.Random) -> int:
    """A number of operands, exponential, cut to 2..14."""
    while True:
        count = MIN_OPERANDS + int(rng.expovariate(1 / (MEAN_OPERANDS - MIN_OPERANDS)))
        if count <= MAX_OPERANDS:
            return count


def all_lengths_alike(rng: random.Random) -> int:
    """A number of operands, 2..14 equally often."""
    return rng.randint(MIN_OPERANDS, MAX_OPERANDS)


def solution(operands: list[int]) -> str:
    """The worked answer: `3+5=8;8+8=16;#16` for [3, 5, 8]."""
    total, steps = operands[0], []
    for operand in operands[1:]:
        steps.append(f"{total}+{operand}={total + operand}")
        total += operand
    return ";".join([*steps, f"#{total}"])


def draw_problems(
    rng: random.Random,
    count: int,
    taken: set[str],
    num_operands: Callable[[random.Random], int] = short_chains_mostly,
) -> list[dict[str, str]]:
    """`count` problems, of operands 1 to 9, whose prompts are not in `taken`, which grows by them."""
    problems: list[dict[str, str]] = []
    while len(problems) < count:
        operands = [rng.randint(1, 9) for _ in range(num_operands(rng))]
        prompt = "+".join(map(str, operands)) + "="
        if prompt not in taken:
            taken.add(prompt)
            problems.append({"prompt": prompt, "solution": solution(operands), "answer": str(sum(operands))})
    return problems


def build_tokenizer():
    """One token a character; a completion ends with <eos>."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(VOCABULARY)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS)


def build_model(hidden: int, layers: int):
    """A Qwen3 of about 0.8 M parameters at the default size."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=hidden,
        intermediate_size=hidden * 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=VOCABULARY.index(PAD),
        bos_token_id=VOCABULARY.index(BOS),
        eos_token_id=VOCABULARY.index(EOS),
    )
    return Qwen3ForCausalLM(config)


def collate(problems: list[dict[str, str]]):
    """(input_ids [B, T], labels [B, T]) padded on the right; labels are -100 on prompt and padding."""
    import torch

    index = {token: i for i, token in enumerate(VOCABULARY)}
    rows = [[index[c] for c in p["prompt"] + p["solution"]] + [index[EOS]] for p in problems]
    width = max(map(len, rows))
    input_ids = torch.tensor([row + [index[PAD]] * (width - len(row)) for row in rows])
    labels = torch.full_like(input_ids, -100)
    for i, (row, problem) in enumerate(zip(rows, problems, strict=True)):
        start = len(problem["prompt"])
        labels[i, start : len(row)] = input_ids[i, start : len(row)]
    return input_ids, labels


def greedy_accuracy(model, problems: list[dict[str, str]]) -> float:
    """Share of problems solved greedily: where every next token is the likeliest one given the
    solution so far, greedy decoding gives just that solution."""
    import torch

    input_ids, labels = collate(problems)
    model.eval()
    with torch.no_grad():
        predicted = model(input_ids).logits[:, :-1].argmax(-1)
    model.train()
    wanted = labels[:, 1:]
    return float(((predicted == wanted) | (wanted == -100)).all(dim=1).float().mean())


def warm_start(model, rng: random.Random, validation: list[dict[str, str]], held_out: set[str], args) -> float:
    """Supervised steps of 32 fresh problems, none of them `held_out`, until `args.target` accuracy on
    `validation`. Returns the accuracy reached."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    accuracy, started = 0.0, time.perf_counter()
    for step in range(1, args.max_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, step / 40) * max(0.1, 1 - step / args.max_steps)
        input_ids, labels = collate(draw_problems(rng, 32, set(held_out), all_lengths_alike))
        loss = model(input_ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0:
            accuracy = greedy_accuracy(model, validation)
            elapsed = time.perf_counter() - started
            if step % 40 == 0 or accuracy >= args.target:
                print(f"warm start: step {step}, loss {loss.item():.3f}, accuracy {accuracy:.3f}, {elapsed:.0f} s")
            if accuracy >= args.target:
                break
    return accuracy


def write_jsonl(path: Path, problems: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps({"prompt": p["prompt"], "answer": p["answer"]}) + "\n" for p in problems))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(".cache/chain_sum"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", type=float, default=0.36, help="greedy accuracy to stop at")
    parser.add_argument("--max-steps", type=int, default=800)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    out: Path = args.out
    if (out / "eval.jsonl").exists():
        print(f"{out} is ready")
        return 0

    import torch
    from transformers.utils.logging import disable_progress_bar

    torch.manual_seed(args.seed)
    torch.set_num_threads(os.cpu_count() or 1)
    disable_progress_bar()
    rng = random.Random(args.seed)
    # One pool of distinct prompts, then the splits: there are only 81 chains of two operands, and each
    # split should have its share of them.
    problems = draw_problems(rng, NUM_EVAL + NUM_VALIDATION + NUM_TRAIN, set())
    rng.shuffle(problems)
    held_out, validation = problems[:NUM_EVAL], problems[NUM_EVAL : NUM_EVAL + NUM_VALIDATION]
    train = problems[NUM_EVAL + NUM_VALIDATION :]
    model = build_model(args.hidden, args.layers)
    unseen = {problem["prompt"] for problem in held_out + validation}
    accuracy = warm_start(model, rng, validation, unseen, args)
    if accuracy < args.target:
        print(f"warm start ended at accuracy {accuracy:.3f}, below {args.target}: try another seed", file=sys.stderr)
        return 1
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out / "model")
    build_tokenizer().save_pretrained(out / "model")
    write_jsonl(out / "train.jsonl", train)
    write_jsonl(out / "eval.jsonl", held_out)  # last: its presence says that the folder is complete
    print(f"{out}: {model.num_parameters():,} parameters, accuracy {accuracy:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
