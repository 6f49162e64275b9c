#!/usr/bin/env bash
# Optuna 5.0.0: workers that start at once on an empty database find its tables half made.
#
# Guess: RDBStorage sets its tables up safely, for many workers on one study is what it is made for.
# Seen: in 10 rounds of three processes that open one fresh SQLite file at once, at least one process
# a round or two ends in OperationalError (table ... already exists) or IntegrityError
# (alembic_version.version_num). PostgreSQL 15 does the same with UniqueViolation on pg_type. A second
# try a second later works, which is what d2_balance.sweep does.
set -eu
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet optuna==5.0.0 SQLAlchemy==2.1.9 alembic==1.20.1
cd "$directory"
cat > race.py <<'PYTHON'
import multiprocessing
import sys

import optuna


def work(barrier, url, answers):
    barrier.wait()
    try:
        optuna.storages.RDBStorage(url)
        answers.put("")
    except Exception as error:
        answers.put(f"{type(error).__name__}: {str(error).splitlines()[0]}")


def main():
    told = []
    for number in range(10):
        barrier, answers = multiprocessing.Barrier(3), multiprocessing.Queue()
        url = f"sqlite:///fresh{number}.db"
        processes = [
            multiprocessing.Process(target=work, args=(barrier, url, answers)) for _ in range(3)
        ]
        for process in processes:
            process.start()
        told += [answer for answer in (answers.get() for _ in processes) if answer]
        for process in processes:
            process.join()
        optuna.storages.RDBStorage(url)  # alone, it opens what the others have left
    print(f"optuna {optuna.__version__}: {len(told)} of 30 workers failed")
    print("\n".join(sorted(set(told))))
    raced = [t for t in told if "already exists" in t or "UNIQUE" in t]
    return 0 if raced and len(raced) == len(told) else 1


if __name__ == "__main__":
    sys.exit(main())
PYTHON
"$directory/venv/bin/python" race.py
