"""Recipe: python launch/recipe.py RECIPE.yaml [--dry-run] [--redo STAGE] [--speed TOKENS_PER_S] [key=value ...]

Runs training stages in order, each by torchrun launch/pretrain.py or launch/align.py, judges their gates, measures every checkpoint, and
ends with one table and one page. Interrupted or killed, the same command goes on where it stopped. Every key is described in
engine/recipe/sections.py and docs/recipes.md; any key can be overridden, such as stages.sft.keys.train.steps=20.

    python launch/recipe.py fit RUN_DIR ... --output law.json [--plot law.png] [--set NAME]

fits a scaling law to finished pretraining runs, for stages with `tokens: chinchilla` and `law: law.json`.
Exit codes: 0 done, 1 error or a shut gate, 2 usage or configuration.
"""

import argparse
import signal
import sys


def main(argv: list[str] | None = None) -> int:
    from engine.config import ConfigError

    argv = sys.argv[1:] if argv is None else argv
    try:
        return fit(argv[1:]) if argv[:1] == ["fit"] else run(argv)
    except ConfigError as error:
        print(f"{len(error.problems)} mistake{'s' * (len(error.problems) > 1)}\n{error}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:  # what a person must mend; anything else is ours and keeps its traceback
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 1


def run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--dry-run", action="store_true", help="validate every stage, print the plan and stop")
    parser.add_argument("--redo", action="append", default=[], metavar="STAGE", help="put it, and what depends on it, aside and train it again")
    parser.add_argument("--speed", type=float, default=0.0, metavar="TOKENS_PER_S", help="what estimates of time assume, all ranks together")
    args = parser.parse_intermixed_args(argv)

    from engine.config import nearest
    from engine.recipe.execute import Execution, RecipeStopped, read_state
    from engine.recipe.launcher import folder_lock, torchrun
    from engine.recipe.plan import make_plan
    from engine.recipe.report import plan_text, table, write_report

    plan = make_plan(args.recipe, args.overrides)
    names = [step.name for step in plan.steps]
    for name in args.redo:
        if name not in names:
            parser.error(f"--redo {name} is no stage of this recipe{nearest(name, names)}")
    if args.dry_run:
        print(plan_text(plan, read_state(plan), args.speed))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the ranks, as Ctrl-C does
    with folder_lock(plan.dir) as lock:
        execution = Execution(plan, lambda job: torchrun(job, lock), say=lambda line: print(line, flush=True))
        try:
            execution.run(args.redo)
        except RecipeStopped:
            write_report(plan, execution.state)
            raise
        write_report(plan, execution.state)
    print(f"\n{table(plan, execution.state)}\n\n{plan.dir / 'report.html'}")
    return 0


def fit(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="recipe.py fit", description="Fit a scaling law to finished pretraining runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR")
    parser.add_argument("--output", required=True, metavar="law.json")
    parser.add_argument("--plot", metavar="law.png")
    parser.add_argument("--set", default="", metavar="NAME", help="validation set whose last loss counts; the only one if left out")
    args = parser.parse_args(argv)

    from engine.recipe import scaling

    law = scaling.fit([scaling.point_of(folder, args.set) for folder in args.runs])
    scaling.write(law, args.output)
    print(scaling.describe(law, args.runs))
    if args.plot:
        scaling.draw(law, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
