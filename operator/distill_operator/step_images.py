"""Which images the attempts of a step ran: merges what pods of the latest attempt report into the step's
status.

Pure. An image is known when its container has started. Its commit is known later, when a pod serves progress
or has ended, so it is added to an entry that exists.
"""

from collections.abc import Sequence

from distill_operator.pod_records import ImageReports, PodImage
from vpmoe.api.status import MAX_IMAGES, StepImage

Images = tuple[StepImage, ...]


def merge_images(known: Images, attempt: int, reports: ImageReports) -> Images:
    """The images of a step, with those that pods of its latest attempt report.

    Repeating it with the same reports changes nothing. Of more than MAX_IMAGES, those of the oldest attempts
    are dropped; what does not fit then is not recorded.
    """
    images = list(known)
    previous = max(
        (min(one.last_attempt, attempt - 1) for one in known if one.first_attempt < attempt), default=0
    )
    for image, commit in sorted(reports, key=_commits_first):
        place = _find(images, attempt, previous, image, commit)
        if place is not None:
            found = images[place]
            changes = {
                "last_attempt": attempt,
                "digest": found.digest or image.digest or None,
                "commit": commit if found.commit is None else found.commit,
            }
            images[place] = StepImage.model_validate({**dict(found), **changes})
        elif len(images) < MAX_IMAGES or _drop_oldest(images, attempt):
            images.append(
                StepImage(
                    first_attempt=attempt,
                    last_attempt=attempt,
                    image=image.image,
                    digest=image.digest or None,
                    commit=commit,
                )
            )
    return tuple(images)


def images_of(images: Sequence[StepImage], attempt: int) -> list[StepImage]:
    """Those that pods of this attempt ran."""
    return [image for image in images if image.first_attempt <= attempt <= image.last_attempt]


def is_another(one: StepImage, other: StepImage) -> bool:
    """Whether the two are known to be different images."""
    if one.image != other.image:
        return True
    return bool(one.digest and other.digest and one.digest != other.digest)


def describe_image(image: StepImage) -> str:
    """The image for people: reference, digest and commit, as far as they are known."""
    digest = f"@{image.digest}" if image.digest and image.digest not in image.image else ""
    return f"{image.image}{digest}" + (f" (commit {image.commit})" if image.commit else "")


def _commits_first(report: tuple[PodImage, str | None]) -> tuple[PodImage, bool, str]:
    """Sort key: a pod that has not reported its commit belongs to the entry of one that has."""
    image, commit = report
    return image, commit is None, commit or ""


def _find(
    images: list[StepImage], attempt: int, previous: int, image: PodImage, commit: str | None
) -> int | None:
    """Place of the entry that a report belongs to: one of this attempt, or of `previous`, the attempt before
    it of which images are known. None if it belongs to none. Of several the one that equals it most.
    """

    def equality(place: int) -> tuple[bool, bool, bool]:
        found = images[place]
        return found.last_attempt == attempt, found.digest == (image.digest or None), found.commit == commit

    places = [
        place
        for place, found in enumerate(images)
        if found.last_attempt in (attempt, previous) and _is_same(found, attempt, image, commit)
    ]
    return max(places, key=equality, default=None)


def _drop_oldest(images: list[StepImage], attempt: int) -> bool:
    """Drop the entry of the oldest attempts. Returns False if all are of this attempt, which drops none: the
    pods would report it again.
    """
    oldest = min(range(len(images)), key=lambda place: images[place].last_attempt)
    if images[oldest].last_attempt == attempt:
        return False
    del images[oldest]
    return True


def _is_same(found: StepImage, attempt: int, image: PodImage, commit: str | None) -> bool:
    """Whether a report is about this entry. What is not known of one of the two is no difference within one
    attempt; of another attempt only the digest tells that the image has not changed.
    """
    if found.image != image.image:
        return False
    if found.last_attempt == attempt:
        digests = not found.digest or not image.digest or found.digest == image.digest
        return digests and (found.commit is None or commit is None or found.commit == commit)
    if not image.digest or found.digest != image.digest:
        return False
    return found.commit is None or commit is None or found.commit == commit
