"""CADD for code in small (Table 3): an autoregressive model is adapted and completes functions.

    python results/code_adapt.py                    one GPU; the same command goes on where it was
    python results/code_adapt.py --tiny             does it run? CPU
    python results/code_adapt.py --bench 1.5B       speed of a random model of Qwen2.5-Coder's
                                                    shape, and the memory it and 7B on 8 GPUs need

A small model of Qwen2's class learns pycode autoregressively (RUNS/ar, then RUNS/model in the form
of the transformers package); cadd.py --backbone adapts it as MDM and as CADD, with the paper's
hints and with weak ones. Each completes functions of held-out files after signature and docstring.
"parses": the share of functions, cut before the first line that is not indented, that ast.parse
takes and that have a statement of the model's; nothing is run. "lines" of a completion, on average:
one that says little parses easily.
"""

import argparse
import ast
import json
import math
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cadd  # noqa: E402
import common  # noqa: E402
from data import Sequences, pycode_files, split_of  # noqa: E402

SHAPES = {  # vocab_size, hidden_size, intermediate_size, layers, heads, of keys, tied
    "tiny": (512, 32, 64, 2, 4, 2, True), "small": (4096, 512, 1408, 8, 8, 2, True),
    "1.5B": (151936, 1536, 8960, 28, 12, 2, True), "7B": (152064, 3584, 18944, 28, 28, 4, False)}
SMALL = ("--length 640 --batch_size 64 --micro_batch 64 --lr 1e-3 --warmup 200 "
         "--lr_schedule cosine --ema 0.999 --save_every 250 --anneal 2000 --no-recompute "
         "--sample_batch 64")
TINY = ("--length 32 --batch_size 4 --micro_batch 4 --anneal 2 --log_every 1 --eval_sequences 2 "
        "--sample_steps 2")

# Weak hints: the embeddings' norm is near 1, the noise four times as large.
METHODS = {"mdm": "--hint none", "cadd": "", "cadd-weak": "--hint_noise 4"}
# Qwen2.5's words: a line's end never joins the next one's indentation. Else a prompt that ends with
# a line would be cut as no text that the model has seen.
QWEN_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
              r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def write_shape(folder: Path, size: str) -> None:
    """config.json of a shape, and a byte-level BPE of pycode's training files: id 0 ends a
    document, [MASK] takes the one row more."""
    V, d, inner, depth, heads, kv, tied = SHAPES[size]
    folder.mkdir(parents=True, exist_ok=True)
    common.write_json(folder / "config.json", dict(
        architectures=["Qwen2ForCausalLM"], model_type="qwen2", vocab_size=V, hidden_size=d,
        intermediate_size=inner, num_hidden_layers=depth, num_attention_heads=heads,
        num_key_value_heads=kv, tie_word_embeddings=tied, eos_token_id=0, rope_theta=1e6))
    if size in ("tiny", "small") and not (folder / "tokenizer.json").exists():
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
        coder, byte = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel
        coder.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"),
            byte(add_prefix_space=False, use_regex=False)])
        coder.decoder = decoders.ByteLevel()
        coder.train_from_iterator(
            (x.decode(errors="replace") for name, x in pycode_files() if split_of(name) == "train"),
            trainers.BpeTrainer(vocab_size=V - 1, special_tokens=["<|endoftext|>"],
                                initial_alphabet=byte.alphabet(), show_progress=False))
        coder.save(str(folder / "tokenizer.json"))


def train_ar(cfg: cadd.Config, ddp: common.DDP, data: Sequences) -> common.Run:
    """From scratch, the package's own causal model; RUNS/ar resumes as any run does."""
    model = common.causal_model(Path(cfg.backbone), data.vocab_size + 1, False).to(ddp.device)
    optimizer = torch.optim.AdamW(model.parameters(), cfg.lr, betas=(0.9, 0.98), fused=True)
    run = common.Run("code_adapt", cfg, ddp, data, model, optimizer, common.EMA(model, cfg.ema))

    def loss_of(some: Sequences, step: int) -> Tensor:
        x = ddp.put(some.train_batch(cfg.seed, step, cfg.batch_size, range(cfg.batch_size)).ids)
        logits = model(input_ids=x, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), x[:, 1:].flatten())

    for step in run.steps(lambda s: (dict(nll_nats=s["nll"] / s["steps"]), {}), loss_of):
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(step, cfg)
        with ddp.autocast():
            loss = loss_of(data, step)
        loss.backward()
        run.add(nll=loss, steps=1, tokens=cfg.batch_size * data.length)
        nn.utils.clip_grad_norm_(model.parameters(), cfg.clip, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.ema.update()
    return run


def function(text: str) -> str:
    """Up to the first line after the indented ones that is neither indented nor empty."""
    lines = text.split("\n")
    begin = next((i for i, x in enumerate(lines) if x[:1] in (" ", "\t")), len(lines))
    return "\n".join(lines[:next((i for i in range(begin, len(lines)) if lines[i][:1].strip()),
                                 len(lines))])


def statements(text: str) -> int:
    """Of the function that begins the text; 0 if it does not parse."""
    try:
        return len(ast.parse(function(text)).body[0].body)
    except (SyntaxError, ValueError, MemoryError, RecursionError, IndexError, AttributeError):
        return 0


def held_out(count: int, data: Sequences) -> list[dict]:
    """Prompts from pycode's test files: plain functions of 2 to 20 statements, those whose length
    in tokens is commonest, since equal lengths share batches."""
    found = []
    for name, text in ((n, x.decode(errors="replace")) for n, x in pycode_files()):
        for node in ast.parse(text).body if split_of(name) == "test" else []:
            if isinstance(node, ast.FunctionDef) and not node.decorator_list:
                told = int(ast.get_docstring(node) is not None)
                source, body = ast.get_source_segment(text, node), node.body[told:]
                if 2 <= statements(source) - told <= 20 and body[0].lineno > node.lineno:
                    lines = source.split("\n")[:body[0].lineno - node.lineno]
                    found.append(dict(task_id=f"{name}/{node.name}", told=str(told),
                                      prompt="\n".join(lines) + "\n"))
    sizes = [len(data.encode(task["prompt"])) for task in found]
    often = Counter(sizes)
    order = sorted(range(len(found)), key=lambda i: (-often[sizes[i]], sizes[i], i))
    return [found[i] for i in order[:count]]


def memory_plan(size: str, gpus: int, B: int, L: int) -> dict:
    """GiB on each GPU in training, computed: what cadd.py --fsdp --recompute keeps there."""
    V, d, inner, depth, heads, kv, tied = SHAPES[size]
    block, root = 2 * d * d * (1 + kv / heads) + 3 * d * inner, V * d * (2 - tied)
    N, logits = depth * block + root, min(2**29, B * L / 2 * V)  # half the tokens are masked
    parts = dict(
        weights=4 * N / gpus, gradients=4 * N / gpus, moments=8 * N / gpus, average=4 * N / gpus,
        gathered=8 * root + 4 * block if gpus > 1 else 2 * N,  # one GPU: autocast's bf16 copies
        residuals=2 * depth * B * L * d, one_block=B * L * (16 * d + 6 * inner) * 2,
        vocabulary=10 * logits + 6 * V * d)
    gib = {k: round(v / 2**30, 2) for k, v in parts.items()}
    return dict(shape=size, parameters=round(N), gpus=gpus, micro_batch=B, length=L, **gib,
                sum=round(sum(gib.values()), 1))


def generate(model: nn.Module, x: Tensor, mask_id: int, count: int, temperature: float):
    """Yields x with up to `count` tokens after each row's prompt, which gaps follow: zeros fill
    the rest. The model gets prompts on the right, so that all rows begin to write at once."""
    given = (x != mask_id).sum(1).tolist()
    n = max(given)
    left = torch.stack([F.pad(row[:g], (n - g, 0)) for row, g in zip(x, given)])
    seen = torch.stack([torch.arange(n, device=x.device) >= n - g for g in given]).long()
    y = model.generate(left, attention_mask=seen, do_sample=True, top_k=0, pad_token_id=0,
                       temperature=max(temperature, 1e-8), max_new_tokens=count)
    x = torch.where(x == mask_id, 0, x)
    for row, g, new in zip(x, given, y[:, n:]):
        row[g:g + len(new)] = new
    yield x


def complete(args: argparse.Namespace, runs: Path, more: list[str]) -> dict[tuple, Path]:
    """Trains and samples what is not there yet -> (method, steps): completions.jsonl."""
    cfg = common.parse_config(cadd, [*more, "--backbone", str(runs / "shape"), "--steps", str(
        args.ar_steps), "--out", str(runs / "ar"), "--prompts", str(runs / "functions.jsonl"),
        "--completion", "8" if args.tiny else "512"])
    ddp = common.DDP.start(cfg)
    data, found = cadd.load(cfg), {}
    common.write_jsonl(runs / "functions.jsonl", held_out(4 if args.tiny else 256, data))
    if args.only in ("", "ar"):
        run = train_ar(cfg, ddp, data)
        with run.ema.swapped_in() as model:
            model.eval().save_pretrained(runs / "model")
            tokenizer = (runs / "shape/tokenizer.json").read_bytes()
            (runs / "model/tokenizer.json").write_bytes(tokenizer)
            found["ar", cfg.completion] = runs / f"ar/{args.temperature}.jsonl"
            if not found["ar", cfg.completion].exists():
                common.complete(cfg, data, ddp, lambda x: generate(
                    model, x, data.mask_id, cfg.completion, args.temperature))
                (runs / "ar/completions.jsonl").rename(found["ar", cfg.completion])
    for method, flags in METHODS.items():
        if args.only not in ("", method):
            continue
        out = runs / method
        common.main(cadd, [*more, *flags.split(), "--backbone", str(runs / "model"), "--steps",
                           str(args.steps), "--out", str(out)])
        for steps in (2, 4) if args.tiny else (32, 64, 128, 512):
            found[method, steps] = out / f"{args.order}-{args.temperature}-{steps}.jsonl"
            if not found[method, steps].exists():
                common.main(cadd, [
                    "--mode", "sample", "--out", str(out), "--device", args.device, "--prompts",
                    cfg.prompts, "--completion", str(cfg.completion), "--order", args.order,
                    "--temperature", str(args.temperature), "--sample_steps", str(steps)])
                (out / "completions.jsonl").rename(found[method, steps])
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default, text in (
            ("runs", "runs/code", "run folders"), ("save", "results/code-adapt.json", "the table"),
            ("ar_steps", 600, "of the first training"), ("steps", 3000, "of each adaptation"),
            ("order", "entropy", "as cadd.py's"), ("temperature", 0.2, "of all draws"),
            ("only", "", f"one of ar, {', '.join(METHODS)}, which need ar: one a GPU, no table"),
            ("device", "auto", "auto, cpu or cuda"), ("data_dir", "data", "as cadd.py's")):
        parser.add_argument(f"--{flag}", type=type(default), default=default, help=text)
    parser.add_argument("--tiny", action="store_true", help="a smoke test")
    parser.add_argument("--bench", choices=SHAPES, help="time 20 steps of a random model")
    args = parser.parse_args(argv)
    runs, more = Path(args.runs), ["--dataset", "pycode", "--device", args.device, "--data_dir",
                                   args.data_dir]
    if args.bench:
        B, L = (2, 32) if args.bench == "tiny" else (8, 2048)
        write_shape(runs / args.bench, args.bench)
        for plan in ((args.bench, 1, B, L), ("7B", 8, 4, 2048)):
            print(json.dumps({"plan_gib": memory_plan(*plan)}), flush=True)
        return common.main(cadd, [*more, "--mode", "bench", "--backbone", str(runs / args.bench),
                                  "--length", str(L), "--batch_size", str(B)])
    if args.only not in ("", "ar", *METHODS):
        parser.error(f"--only {args.only} is not one of ar, {', '.join(METHODS)}")
    write_shape(runs / "shape", "tiny" if args.tiny else "small")
    rows, found = [], complete(args, runs, [*more, *(TINY if args.tiny else SMALL).split()])
    for (method, steps), file in found.items() if not args.only else ():
        tasks, made = ([json.loads(line) for line in path.read_text().splitlines()]
                       for path in (runs / "functions.jsonl", file))
        texts = [(x["prompt"], x["prompt"] + x["completion"], int(t["told"]))
                 for x, t in zip(made, tasks)]
        n, share = len(texts), sum(statements(y) > told for _, y, told in texts) / len(texts)
        lines = sum(function(y).rstrip().count("\n") + 1 - x.count("\n") for x, y, _ in texts) / n
        rows.append(dict(method=method, steps=steps, parses=share, functions=n, lines=lines,
                         stderr=math.sqrt(share * (1 - share) / n)))
        print("{method:9s} {steps:4d} steps: {parses:.1%} ± {stderr:.1%} of {functions} parse, "
              "{lines:.1f} lines".format(**rows[-1]))
    rows and common.write_json(Path(args.save), dict(
        **{k: v for k, v in vars(args).items() if k not in ("runs", "data_dir", "save", "only")},
        rows=rows,
        **common.environment(common.DDP.start(cadd.Config(device=args.device)))))


if __name__ == "__main__":
    common.run_main(main)
