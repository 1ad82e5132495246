"""The table of tasks: each has what the table asks for, and is cheap to import."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

from pipelines.evaluate.task_table import TASKS, settings_key
from pipelines.recipe.base import field_types
from pipelines.recipe.evaluate import Evaluate

each_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


@each_task
def test_every_task_has_what_the_table_asks_for(task) -> None:
    module = import_module(f"pipelines.evaluate.tasks.{task.module}")
    assert isinstance(task.title, str)
    assert all(callable(getattr(module, name)) for name in ("lacks", "cells", "measure"))


def test_a_tasks_settings_have_its_name() -> None:
    keys = set(field_types(Evaluate))
    assert {settings_key(task) for task in TASKS} - keys == {"heldout", "reconstruction"}


@pytest.mark.slow
def test_a_driver_imports_all_tasks_without_torch() -> None:
    modules = [f"pipelines.evaluate.tasks.{task.module}" for task in TASKS.values()]
    code = f"import sys, pipelines.evaluate.run, {', '.join(modules)}; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"
