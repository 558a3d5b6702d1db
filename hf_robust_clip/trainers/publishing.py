"""What a run leaves behind: its record, its card and report, its adapters, and what reaches the Hub."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, logging

from ..arguments import CLIPTrainingArguments
from ..data.collator import CLIPDataCollator
from ..defences import Defence
from ..describing import describe_dataset, describe_evaluator
from ..evaluation.embedding import Embedder
from ..files import write_text
from ..locking import FolderInUseError, sole_writer
from ..models import check_weights
from ..record import RUN_FILE, RunRecord, Skipped
from ..telling import (
    Control,
    MatchedPair,
    RunPictures,
    check_report_extra,
    kept_card,
    license_of,
    render_run_report,
    write_card,
)
from ..wording import shortened, shown
from .adapters import (
    ADAPTER_CONFIG,
    check_adapter_file,
    complete_adapter_file,
    has_adapters,
    merged,
    remove_adapter_files,
    warn_of_local_base,
)
from .checkpoints import Staging, keep_best_alone, newest_checkpoint, trouble_with
from .pictures import pictures_of
from .recording import record_of

logger = logging.get_logger(__name__)


@contextmanager
def sole_training(args: TrainingArguments, argument: str = "output_dir") -> Iterator[None]:
    """
    A context in which no other training writes to `args.output_dir`, for all ranks of one: the main process locks.

    Args:
        args (`TrainingArguments`): Of the training.
        argument (`str`, defaults to `"output_dir"`): What messages call the folder.

    Raises:
        [`~locking.FolderInUseError`]: On all ranks, if somebody else writes there.
    """
    with ExitStack() as stack:
        refusal: list[Any] = [None]
        if args.process_index == 0:
            try:
                stack.enter_context(sole_writer(Path(str(args.output_dir)), argument, "a training"))
            except FolderInUseError as error:
                refusal = [str(error)]
        if args.world_size > 1:
            broadcast_object_list(refusal)
        if refusal[0] is not None:
            raise FolderInUseError(refusal[0])
        yield


class PublishingTrainer(Trainer):
    """
    The part of [`CLIPTrainer`] that tells of a run, and keeps what is saved and pushed whole and free of secrets.
    """

    args: CLIPTrainingArguments
    evaluators: Sequence[Any]
    defence: Defence
    data_collator: CLIPDataCollator
    image_augmentation: Any

    #: The evaluators' figures before training, and after it.
    figures_before: Mapping[str, float | None] | None = None
    figures_after: Mapping[str, float | None] | None = None
    #: The rows passed over, as of the last checkpoint or the end of training, on all ranks.
    skipped: Skipped | None = None
    _seconds_before = 0.0
    _train_begin: float | None = None
    _staging: Staging | None = None
    _unwrapped: tuple[Any, Any] | None = None
    _described: tuple[Any, dict[str, Any]] | None = None

    @property
    def loaded_from(self) -> str:
        """The folder or Hub id that the model was loaded from; `""` where it was made."""
        return str(getattr(self.unwrapped_model.config, "_name_or_path", "") or "")

    @property
    def unwrapped_model(self) -> Any:
        """The model without what distributed training wraps around it."""
        if self._unwrapped is None or self._unwrapped[0] is not self.model:
            # Looking for wrappers goes through all modules.
            self._unwrapped = self.model, self.accelerator.unwrap_model(self.model)
        return self._unwrapped[1]

    def record(self) -> RunRecord:
        """What this run is and has come to, for its card and its report. It is saved beside the model."""
        return record_of(
            type(self),
            self.unwrapped_model,
            self.args,
            self.state,
            data=self.describe_data(),
            evaluators=self.evaluators,
            before=self.figures_before,
            after=self.figures_after,
            defence=self.defence,
            image_size=self.data_collator.preprocess.image_size,
            augmentations=(self.image_augmentation, self.data_collator.text_augmentation),
            skipped=self.skipped,
            seconds=self.training_seconds,
        )

    def make_embedder(self) -> Embedder:
        """One for the model as it is. It shares its work among the ranks: call it on all of them."""
        return Embedder(
            self.unwrapped_model,
            self.processing_class,
            batch_size=self.args.eval_batch_size,
            # Sharded parameters come together only while all ranks encode in step.
            across_ranks=not (self.is_fsdp_enabled or self.is_deepspeed_enabled),
            check=False,
        )

    def pictures(self) -> RunPictures:
        """What a report shows of the model as it is. All ranks share the work: call it on all of them."""
        embedder = self.make_embedder()
        return pictures_of(self.evaluators, embedder, self._matches(embedder))

    def _matches(self, embedder: Embedder) -> list[MatchedPair]:
        """What training pairs are matched with, where the defence matches."""
        return []

    def save_report(self, path: str | os.PathLike[str], controls: Mapping[str, RunRecord] | None = None) -> None:
        """
        Write the report of this run as one HTML file that needs nothing beside it. Its pictures take the model as it
        is and the evaluators' images; call it on all ranks.

        Args:
            path (`str` or path): Of the file, such as `"report.html"`. Its folder is made, a file there replaced.
            controls (mapping of `str` to [`RunRecord`], *optional*): Other runs, whose figures stand beside those of
                this one, and what to call them.

        Raises:
            `ValueError`: If it is a folder.
            `ModuleNotFoundError`: Without the extra `report`.
        """
        check_report_extra()
        file = Path(path)
        if file.is_dir():
            raise ValueError(
                f"path: {file} is a folder; accepted is the name of a file, such as {file / 'report.html'}"
            )
        pictures = self.pictures()
        if self.args.should_save:
            file.parent.mkdir(parents=True, exist_ok=True)
            others = [Control(label, record) for label, record in (controls or {}).items()]
            write_text(file, render_run_report(self.record(), pictures, others))

    def describe_data(self) -> dict[str, Any] | None:
        """What the training data is, without its rows; `None` without any. It is read once: millions take a while."""
        data = self.train_dataset
        if data is None:
            return None
        if self._described is None or self._described[0] is not data:
            self._described = data, describe_dataset(data)
        return dict(self._described[1])

    @property
    def training_seconds(self) -> float:
        """Time spent in training so far, evaluations included, over all its parts where it was resumed."""
        running = 0.0 if self._train_begin is None else time.perf_counter() - self._train_begin
        return self._seconds_before + running

    # ---- The record, while it is made ----

    def begin_record(self) -> None:
        """Called when training starts, or goes on."""
        for evaluator in self.evaluators:
            describe_evaluator(evaluator)
        self._train_begin, self.figures_after = time.perf_counter(), None
        if self.state.global_step == 0:
            self._seconds_before = 0.0

    def end_record(self) -> None:
        """Called when training is over."""
        self._seconds_before, self._train_begin = self.training_seconds, None

    def continue_record(self, checkpoint: str) -> None:
        """Take over what a checkpoint's record knows and the Trainer's state does not."""
        if not os.path.isfile(os.path.join(checkpoint, RUN_FILE)):
            return
        try:
            earlier = RunRecord.load(checkpoint)
        except ValueError as error:
            # Of another version, perhaps: training needs nothing of it.
            logger.warning(shortened(f"The card and the report will not know of the run until here: {error}"))
            return
        self.figures_before = earlier.before or self.figures_before
        self._seconds_before = earlier.environment.seconds

    def note_figures(self, figures: dict[str, float]) -> None:
        """Keep the figures of an evaluation outside of training; the Trainer's log has the others."""
        if figures and not self.is_in_train:
            if self.state.global_step == 0:
                self.figures_before = figures
            else:
                self.figures_after = figures

    # ---- What is saved ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        folder = output_dir or str(self.args.output_dir)
        if not has_adapters(self.unwrapped_model):
            super()._save(output_dir, state_dict)
        elif self.args.merge_adapters and self._staging is None:
            self._save_merged(folder, state_dict)
        else:
            with kept_card(folder):
                super()._save(output_dir, state_dict)
            complete_adapter_file(self.unwrapped_model, folder, state_dict)
        self.record().save(folder)

    def _save_merged(self, folder: str, state_dict: dict[str, Any] | None) -> None:
        trained = self.model
        self.model = merged(self.unwrapped_model)
        try:
            super()._save(folder, state_dict)
        finally:
            self.model = trained
        remove_adapter_files(folder)

    # ---- Checkpoints ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        As the Trainer's. `resume_from_checkpoint=True` takes the newest checkpoint that is whole, and names those that
        are not.

        Raises:
            `ValueError`: If there is none, or the one that is named is not whole; if another process writes to
                `output_dir` ([`~locking.FolderInUseError`]); without a checkpoint, if `output_dir` is the folder that
                the model was loaded from, whose files would be replaced.
        """
        with sole_training(self.args):
            folder = str(self.args.output_dir)
            if resume_from_checkpoint is True:
                resume_from_checkpoint = newest_checkpoint(folder)
                if resume_from_checkpoint is None:
                    raise ValueError(
                        f"resume_from_checkpoint=True, but output_dir={shown(folder)} has no whole checkpoint"
                    )
            elif isinstance(resume_from_checkpoint, (str, os.PathLike)):
                trouble = trouble_with(Path(resume_from_checkpoint))
                if trouble is not None:
                    raise ValueError(
                        f"resume_from_checkpoint={shown(str(resume_from_checkpoint))} is not a checkpoint: {trouble}"
                    )
            elif Path(folder, CONFIG_NAME).is_file() and Path(self.loaded_from).resolve() == Path(folder).resolve():
                raise ValueError(
                    f"output_dir={shown(folder)} is the folder that the model was loaded from, and would be written "
                    "over: give another one"
                )
            # An evaluation before marks the model as prepared, and accelerate would not wrap it for training: ranks
            # would drift apart (transformers 5.23, accelerate 1.15).
            vars(self.unwrapped_model).pop("_is_accelerate_prepared", None)
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        check_adapter_file(self.unwrapped_model, resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # The Trainer goes on with whatever fits, and the rest as it is.
        ignored = set(getattr(self.model, "_keys_to_ignore_on_save", None) or ())
        found = {
            "missing_keys": set(load_result.missing_keys) - ignored,
            "unexpected_keys": load_result.unexpected_keys,
        }
        check_weights(self.unwrapped_model, found, "the checkpoint")
        super()._issue_warnings_after_load(load_result._replace(unexpected_keys=[]))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        final = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._staging = Staging(final, self.state, self.args)
        try:
            with self._staging.open():
                super()._save_checkpoint(model, trial)
        finally:
            self._staging = None

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        keep_best_alone(Path(self._get_output_dir(trial=trial)), self.state, self.args)
        return super()._finalize_training(trial, *args, **kwargs)

    def _staged(self, output_dir: str) -> str:
        return output_dir if self._staging is None else self._staging.path(output_dir)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's, with the record of the run beside the model."""
        if self._staging is not None:
            super().save_model(output_dir if output_dir is None else self._staged(output_dir), _internal_call)
            return
        folder = Path(output_dir or str(self.args.output_dir))
        # By the main process alone, which many call it on.
        with sole_writer(folder, "output_dir", "a training") if self.args.process_index == 0 else nullcontext():
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(self._staged(output_dir))

    def _save_scaler(self, output_dir: str) -> None:
        super()._save_scaler(self._staged(output_dir))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(self._staged(output_dir))
        if self._staging is not None:
            self._staging.all_written()

    # ---- The Hub ----

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """
        Write the model card of this run, `README.md` in `args.output_dir`, from [`record`]: what was done, the figures
        of the evaluators before and after, and what was not measured. A `README.md` that a person wrote stays.

        Args:
            language, tags, model_name: As of `transformers.Trainer`.
            license (`str`, *optional*): `None`: that of the model that training started from, if its card is on disk.
            finetuned_from (`str`, *optional*): Hub id of that model. `None`: the one that it was loaded from.
            tasks (`str` or `list[str]`, *optional*): In place of `zero-shot-image-classification`.
            dataset_tags (`str` or `list[str]`, *optional*): Hub ids of the training data, beside what it says itself.
            dataset, dataset_args (`str` or `list[str]`, *optional*): What the data is called, and its arguments.

        Raises:
            `ValueError`: If `finetuned_from` or one of `dataset_tags` is not an id of the Hub.
        """
        if not self.is_world_process_zero():
            return
        write_card(
            self.record(),
            str(self.args.output_dir),
            language=language,
            license=license or license_of(self.loaded_from),
            tags=tags,
            model_name=model_name or Path(str(self.args.output_dir)).resolve().name,
            base_model=finetuned_from,
            tasks=tasks,
            datasets=dataset_tags,
            dataset_names=dataset,
            dataset_args=dataset_args,
            repo_id=self.hub_model_id or self.args.hub_model_id,
        )

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """
        As the Trainer's, with the card of [`create_model_card`].

        Raises:
            `ValueError`: With `merge_adapters`, if the repository has adapters, which loading would prefer to the
                merged model.
        """
        if self.args.merge_adapters and self.hub_model_id is None:
            self.init_hf_repo(token=kwargs.get("token"))
        if self.args.merge_adapters and self.is_world_process_zero():
            token, revision = kwargs.get("token") or self.args.hub_token, kwargs.get("revision")
            if HfApi().file_exists(
                str(self.hub_model_id), ADAPTER_CONFIG, revision=revision or self.args.hub_revision, token=token
            ):
                raise ValueError(
                    f"merge_adapters=True, but {self.hub_model_id} has adapters ({ADAPTER_CONFIG}), which loading "
                    "prefers to a merged model: push to another repository, or delete them there first"
                )
        if self.is_world_process_zero():
            warn_of_local_base(self.unwrapped_model, self.args)
        return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.args.hub_always_push:
            # The push under way reads the files that this one is about to overwrite: what arrived would be torn.
            self._finish_current_push()
        self._warn_of_failed_pushes()
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._warn_of_failed_pushes()

    def _warn_of_failed_pushes(self) -> None:
        """The Trainer pushes checkpoints in the background, and does not look at what became of it."""
        push = getattr(self, "push_in_progress", None)
        if push is None:
            return
        over = [job for job in push.jobs if job.done()]
        push.jobs = [job for job in push.jobs if job not in over]
        for error in filter(None, (job.exception() for job in over)):
            reason = str(error) if error.__cause__ is None else f"{error} {error.__cause__}"
            logger.warning(
                f"A push to {self.hub_model_id} during training failed. Training goes on, and what it saves is in "
                f"{shortened(str(self.args.output_dir), 120)}; trainer.push_to_hub() pushes it. The reason: "
                f"{shortened(reason, 200)}"
            )
