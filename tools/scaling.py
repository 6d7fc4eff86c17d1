"""How much ranks idle, and what a step on many of them takes: `python -m tools.scaling measure` and `predict`.

`measure` trains one network divided in several ways and times what each rank does; `predict` simulates as many ranks as
are asked for, and with `--check` says how far it is from what was measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path

VARIANTS = ("C2A2", "C4A8")


def main() -> None:
    parser = argparse.ArgumentParser("tools.scaling", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    for name in ("measure", "predict"):
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path, required=True, help="folder for the tables and the plot")
    measure, predict = commands.choices["measure"], commands.choices["predict"]
    measure.add_argument("--variant", choices=VARIANTS, nargs="+", default=["C2A2"], help="networks")
    measure.add_argument("--steps", type=int, default=15, help="that are timed, after three others")
    measure.add_argument("--rounds", type=int, default=3, help="of which the middle one counts, where ranks compute")
    measure.add_argument("--ranks", type=int, default=16, help="the most, emulated ones too")
    predict.add_argument("--variant", choices=VARIANTS, default="C2A2", help="network")
    predict.add_argument("--check", type=Path, help="measured.csv to compare with")
    predict.add_argument("--links", type=Path, help="TOML file; by default the links that were measured")
    predict.add_argument("--ranks", type=int, default=4096, help="the most")
    args = parser.parse_args()
    if args.what == "measure":
        if args.steps < 2:
            parser.error(f"--steps {args.steps}: how much steps differ is known of two at least")
        if args.rounds < 1:
            parser.error(f"--rounds {args.rounds}: must be at least 1")
        from tools.ranks import measure as measuring

        measuring.run(args.out, args.variant, args.steps, args.rounds, args.ranks)
    else:
        from tools.ranks import predict as predicting

        predicting.run(args.out, args.check, args.links, args.variant, args.ranks)


if __name__ == "__main__":
    main()
