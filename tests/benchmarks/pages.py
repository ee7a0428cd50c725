"""How long a rerun of the feature page and of the list takes, on a planted store.

    python -m tests.benchmarks.pages --features 9216

Times whole script runs under AppTest (no browser, no network), one JSON line: median and largest of 30 features that
were not seen before, of one seen before, and of list pages.
"""

import argparse
import json
import logging
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

from activations.files import write_json
from tests.planted import planted_store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=9216)
    parser.add_argument("--documents", type=int, default=160)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "bench"
        write_json(run / "run.json", {"format": 1, "model": "none", "corpus": "none", "n_tokens": 0, "context": 128})
        planted_store(run / "dictionaries" / "d", n_features=args.features, n_documents=args.documents)
        os.environ["SAE_RUNS_DIR"] = scratch
        print(json.dumps({"features": args.features, **timings(args.features)}))


def timings(n: int) -> dict[str, dict[str, float]]:
    from streamlit.testing.v1 import AppTest

    logging.disable(logging.WARNING)
    app = AppTest.from_file(str(Path(__file__).parents[2] / "app" / "main.py"), default_timeout=120)
    app.run()

    def rerun(**query: object) -> float:
        for key, value in {"run": "bench", "dictionary": "d", **query}.items():
            app.query_params[key] = str(value)
        start = time.perf_counter()
        app.run()
        assert not app.exception, app.exception
        return 1000 * (time.perf_counter() - start)

    chosen = random.Random(0)
    app.switch_page("views/feature.py")
    rerun(feature=0)
    results = {"feature_new_ms": [rerun(feature=chosen.randrange(n)) for _ in range(30)]}
    results["feature_again_ms"] = [rerun(feature=5) for _ in range(10)][1:]
    app.switch_page("views/features.py")
    rerun()
    results["list_ms"] = [rerun(page=page) for page in range(2, 12)]
    return {
        name: {"median": round(statistics.median(times), 1), "max": round(max(times), 1)}
        for name, times in results.items()
    }


if __name__ == "__main__":
    main()
