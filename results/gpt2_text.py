"""English text in GPT-2's tokens, to choose CADD's hints at owt's vocabulary without owt.

    python results/gpt2_text.py                 data/nltk-gpt2 from the archives of english27
    python cadd.py --dataset data/nltk-gpt2 ... see results/rerun.py, group vocabulary

The documents are english27's as they are written: capitals, digits and punctuation stay. Each ends
with GPT-2's end token; the shuffled whole is split 90/5/5. 17 MB of downloads.
"""

import argparse
import random
import re
import sys
from pathlib import Path

import numpy as np
import tiktoken

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
import data  # noqa: E402


def spaced(text: str) -> str:
    """With single spaces, and lines as they are."""
    return re.sub(r"[^\S\n]+", " ", text).strip()


def main(args: argparse.Namespace) -> None:
    builder = data.DatasetBuilder([args.data_dir / "nltk"])
    builder.folders[0].mkdir(parents=True, exist_ok=True)
    texts = [text for name in data.ENGLISH27_ARCHIVES
             for text in data.english27_documents(
                 name, builder.fetch(f"{data.NLTK_URL}{name}.zip"), spaced)]
    random.Random(0).shuffle(texts)
    coder = tiktoken.get_encoding("gpt2")
    ids = np.concatenate([np.array([*coder.encode_ordinary(text), coder.eot_token], np.uint16)
                          for text in texts])
    out = args.out or args.data_dir / "nltk-gpt2"
    out.mkdir(parents=True, exist_ok=True)
    cuts = [0, len(ids) * 90 // 100, len(ids) * 95 // 100, len(ids)]
    for split, begin, end in zip(("train", "valid", "test"), cuts, cuts[1:]):
        np.save(out / f"{split}.npy", ids[begin:end])
    common.write_json(out / "meta.json", dict(vocab_size=coder.n_vocab, eos_id=coder.eot_token))
    print(f"{out}: {len(texts):,} documents, {len(ids):,} tokens, {len(np.unique(ids)):,} in use")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, help="default: DATA_DIR/nltk-gpt2")
    common.run_main(main, parser.parse_args())
