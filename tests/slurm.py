"""A stand-in for Slurm on one machine: runs what the scripts of docs/guides/cluster.md say, without a queue."""

from pathlib import Path

TOOLS = {
    # For each index of --array runs the script at once, with the arguments that follow it.
    "sbatch": """
array=0
while [ "${1#--}" != "$1" ]; do case $1 in --array=*) array=${1#--array=};; esac; shift; done
export SLURM_JOB_ID=$$ SLURM_NNODES=1 SLURM_JOB_NODELIST=localhost
for SLURM_ARRAY_TASK_ID in $(seq "${array%-*}" "${array#*-}"); do export SLURM_ARRAY_TASK_ID; bash "$@"; done
""",
    # The command on this host: srun runs it on every one.
    "srun": """
while [ "${1#--}" != "$1" ]; do shift; done
exec "$@"
""",
    "scontrol": """
test "$1 $2" = "show hostnames" || exit 1
echo "$3" | tr , '\\n'
""",
}


def install(folder: Path) -> str:
    """Writes the commands into a folder. Returns it, for PATH."""
    folder.mkdir()
    for name, text in TOOLS.items():
        (folder / name).write_text(f"#!/bin/bash\nset -eu{text}")
        (folder / name).chmod(0o755)
    return str(folder)
