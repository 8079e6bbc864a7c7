"""`capjax reinforce`: a trained captioner learns from rewards of its own captions."""

import argparse

from capjax.commands.train import MAY_CHANGE as MAY_CHANGE_IN_TRAINING

MAY_CHANGE = (*MAY_CHANGE_IN_TRAINING, "alarms.*", "rewards.batch_size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `capjax reinforce`: those of `capjax train`, and two of its fields by name."""
    from capjax.commands import train

    train.add_arguments(parser)
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="the captioner to start from (as --config.warm_start.path=DIR)",
    )
    parser.add_argument(
        "--towers",
        metavar="DIR",
        help="the contrastive towers that rewards read (as --config.rewards.towers=DIR)",
    )


def run(args: argparse.Namespace) -> None:
    """Checks all that can be checked before the first byte is written, then trains."""
    import contextlib

    from capjax.commands import distributed, runtime, settings

    overrides = [*args.overrides]
    overrides += [f"--config.warm_start.path={args.checkpoint}"] * bool(args.checkpoint)
    overrides += [f"--config.rewards.towers={args.towers}"] * bool(args.towers)
    config = settings.load_config(args.config, overrides)
    if "policy" not in config:
        from capjax.errors import UserError

        raise UserError(
            f"--config={args.config} is one of `capjax train`; reinforcement starts from "
            "capjax.commands.reinforce_config, as configs/emoji_reinforce.py does"
        )
    with contextlib.ExitStack() as stack:
        with runtime.rarer_collections():
            runtime.start(args, settings.flatten(settings.resolved_dict(config)))
            peers = distributed.peers()

            from capjax.training.stopping import StopSignals

            stack.enter_context(StopSignals(peers))
            from capjax.commands.reinforce_config import reinforce_config
            from capjax.commands.reinforce_plan import build_reinforcement
            from capjax.commands.train import check_schedule, train_run
            from capjax.data.layouts import without_caches
            from capjax.training.workdir import open_workdir

            plan = build_reinforcement(config, args.workdir)
        check_schedule(plan.config, args.workdir)
        resolved, defaults = (settings.resolved_dict(x) for x in (plan.config, reinforce_config()))
        workdir = stack.enter_context(
            open_workdir(args.workdir, resolved, MAY_CHANGE, without_caches, defaults)
        )
        train_run(plan, workdir, peers)
