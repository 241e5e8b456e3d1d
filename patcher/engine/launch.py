"""``python -m patcher.engine.launch MODEL …``: what the ``vllm serve`` command runs.

``vllm`` itself asks for the version of a distribution of that name, which the CPU build
doesn't have (``vllm/entrypoints/cli/main.py``), so its ``serve`` subcommand is called here.
"""

from __future__ import annotations


def main() -> None:
    """Parse vLLM's own options and serve."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="patcher serve"))
    args = parser.parse_args()
    configure_logging_from_args(args)
    command = ServeSubcommand()
    command.validate(args)
    command.cmd(args)


if __name__ == "__main__":
    main()
