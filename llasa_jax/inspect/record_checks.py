"""What the records themselves give away: broken codes, clips that do not fit, copies, leaks, and
texts of other clips.
"""

from collections import Counter

import numpy as np

from llasa_jax.inspect.findings import Finding, clips, examples, grave
from llasa_jax.inspect.scan import Scan, repeated_codes, suspicious_pace
from llasa_jax.speech.vocab import NUM_CODES

USUAL_PACE = (0.4, 25)  # codes per byte of text; reading English aloud takes about 3.5
FEW_CLIPS = 20  # with fewer, that texts repeat says nothing


def check_scans(scans: dict[str, Scan], max_length: int, too_long: str = "drop") -> list[Finding]:
    """All that can be seen in the records of one or more splits. The first split is the one that
    is trained on, and the second is compared with it.
    """
    findings = []
    for split, scan in scans.items():
        findings += _check_refused(split, scan)
        findings += _check_codes(split, scan)
        findings += _check_lengths(split, scan, max_length, too_long)
        findings += _check_texts(split, scan)
    return findings + _check_repeats(scans) + _check_leaks(scans) + _check_pace(scans)


def _check_refused(split: str, scan: Scan) -> list[Finding]:
    if not scan.refused:
        return []
    reason = scan.refused[0][1].split(";")[0]
    message = f"{clips(len(scan.refused), scan)} of {split} cannot become a prompt: {reason}"
    fix = "fix them or leave them out; training stops at the first"
    ids = examples(clip for clip, _ in scan.refused)
    return [Finding("bad", "prompt", message, fix, ids)]


def _check_codes(split: str, scan: Scan) -> list[Finding]:
    findings = []
    total, valid = int(scan.codes.sum()), int(scan.usage.sum())
    if valid < total:
        message = f"{total - valid:,} of {total:,} codes of {split} lie outside 0..{NUM_CODES - 1}"
        fix = (
            "subtract the id of <|s_0|>: import them again with --code-offset"
            if valid < total / 2
            else "encode the clips again"
        )
        findings.append(Finding("bad", "codes", message, fix))
    constant = np.flatnonzero((scan.codes >= 50) & (scan.distinct <= 0.02 * scan.codes))
    if len(constant):
        severity = grave(len(constant), len(scan.ids))
        message = f"{clips(len(constant), scan)} of {split} repeat one or a few codes throughout"
        ids = examples(scan.ids[i] for i in constant)
        fix = "listen to them: silence, or a broken codec"
        findings.append(Finding(severity, "codes", message, fix, ids))
    used = int((scan.usage > 0).sum())
    if valid >= 100_000 and used < 1000:
        message = f"{split} uses only {used} of {NUM_CODES:,} codes in {valid:,}"
        fix = "encode again with XCodec2; these come from another codec or a broken one"
        findings.append(Finding("bad", "codes", message, fix))
    message = f"{total:,} codes of {split} use {used:,} of {NUM_CODES:,}"
    return findings or [Finding("ok", "codes", message)]


def _check_lengths(split: str, scan: Scan, max_length: int, too_long: str) -> list[Finding]:
    if scan.tokens is None:
        return []
    beyond = np.flatnonzero(scan.tokens > max_length)
    longest = scan.tokens.max(initial=0)
    if not len(beyond):
        message = f"every clip of {split} fits {max_length} tokens; the longest has {longest}"
        return [Finding("ok", "length", message)]
    share = scan.seconds[beyond].sum() / max(scan.seconds.sum(), 1e-9)
    about = f"{clips(len(beyond), scan)} of {split} ({share:.1%} of its speech)"
    ids = examples(scan.ids[i] for i in beyond)
    if too_long == "cut":
        message = (
            f"{about} lose their end marker at data.max_length={max_length}; the longest has"
            f" {longest} tokens"
        )
        fix = "set data.too_long to drop, or raise data.max_length: they teach not to stop"
        return [Finding("warn", "length", message, fix, ids)]
    message = (
        f"{about} do not fit data.max_length={max_length} and are dropped; the longest has"
        f" {longest} tokens"
    )
    fix = "raise data.max_length, or split them into sentences"
    return [Finding(grave(len(beyond), len(scan.ids), 0.5), "length", message, fix, ids)]


def _check_texts(split: str, scan: Scan) -> list[Finding]:
    """Texts that are something else: names of speakers, or one of a few labels."""
    named = [i for i, digest in enumerate(scan.text_digests) if digest in scan.speaker_digests]
    if named:
        message = f"{clips(len(named), scan)} of {split} have the name of a speaker as their text"
        fix = "look for columns that were mixed up where the dataset was made"
        ids = examples(scan.ids[i] for i in named)
        return [Finding(grave(len(named), len(scan.ids)), "text", message, fix, ids)]
    counts = Counter(scan.text_digests)
    if len(scan.ids) < FEW_CLIPS or 2 * len(counts) > len(scan.ids):
        return []
    (digest, count), *_ = counts.most_common(1)
    at = scan.text_digests.index(digest)
    message = (
        f"{clips(len(scan.ids), scan)} of {split} share {len(counts):,} different texts;"
        f" {count:,} of them say {scan.repeated_texts[digest]!r}"
    )
    fix = "if that is not what is spoken, look for the right column of texts"
    return [Finding("warn", "text", message, fix, (scan.ids[at],))]


def _check_repeats(scans: dict[str, Scan]) -> list[Finding]:
    findings = []
    for split, scan in scans.items():
        groups = repeated_codes([scan])
        texts = [len({scan.text_digests[row] for _, row in group}) for group in groups]
        for differ, what in ((True, "a different text"), (False, "the same text")):
            of_kind = [
                group for group, count in zip(groups, texts, strict=True) if (count > 1) == differ
            ]
            if not of_kind:
                continue
            count = sum(len(group) for group in of_kind)
            severity = grave(count, len(scan.ids)) if differ else "warn"
            message = (
                f"{clips(count, scan)} of {split} have the same codes as another clip, and {what}"
            )
            fix = "find which text is right" if differ else "leave out all but one"
            ids = examples(scan.ids[row] for _, row in of_kind[0])
            findings.append(Finding(severity, "duplicate", message, fix, ids))
    total = sum(len(scan.ids) for scan in scans.values())
    message = f"no two of {total:,} clips have the same codes"
    return findings or [Finding("ok", "duplicate", message)]


def _check_leaks(scans: dict[str, Scan]) -> list[Finding]:
    if len(scans) < 2:
        return []
    (train_name, train), (name, held_out) = list(scans.items())[:2]
    ids, codes = set(train.ids), set(train.code_digests)
    leaks = [
        clip
        for clip, digest in zip(held_out.ids, held_out.code_digests, strict=True)
        if clip in ids or digest in codes
    ]
    if not leaks:
        return [Finding("ok", "leak", f"no clip of {name} is in {train_name}")]
    message = (
        f"{clips(len(leaks), held_out)} of {name} are in {train_name} too, so the validation loss"
        " flatters"
    )
    severity = grave(len(leaks), len(held_out.ids))
    return [Finding(severity, "leak", message, "split the clips again", examples(leaks))]


def _check_pace(scans: dict[str, Scan]) -> list[Finding]:
    findings = []
    codes = np.concatenate([scan.codes for scan in scans.values()])
    text_bytes = np.concatenate([scan.text_bytes for scan in scans.values()])
    lengths = np.log(np.maximum([codes, text_bytes], 1))
    # Where either hardly varies, as in corpora of single words, its correlation says nothing.
    if len(codes) >= 100 and lengths.std(1).min() > 0.15:
        correlation = np.corrcoef(lengths)[0, 1]
        if correlation < 0.2:
            message = (
                f"long texts do not go with long clips (correlation {correlation:.2f}; real speech"
                " has above 0.8)"
            )
            fix = "the texts belong to other clips: look for lines that slipped in the manifest"
            return [Finding("bad", "pace", message, fix)]
    pace = float(np.median(codes / np.maximum(text_bytes, 1)))
    if not USUAL_PACE[0] < pace < USUAL_PACE[1]:
        message = (
            f"the median clip has {pace:.2f} codes per byte of text, where reading aloud takes"
            " about 3.5"
        )
        fix = "check that texts and codes belong together, and that there are 50 codes per second"
        findings.append(Finding("warn", "pace", message, fix))
    many, few = suspicious_pace(list(scans.values()))
    for what, found, fix in (
        ("many", many, "look for long silence, or speech that the text lacks"),
        ("few", few, "look for cut audio, or text that is not spoken"),
    ):
        for (split, scan), rows in zip(scans.items(), found, strict=True):
            if len(rows):
                message = (
                    f"{clips(len(rows), scan)} of {split} have far too {what} codes for their text"
                )
                severity = grave(len(rows), len(scan.ids), 0.2)
                ids = examples(scan.ids[i] for i in rows)
                findings.append(Finding(severity, "pace", message, fix, ids))
    message = f"texts and clips go together: {pace:.1f} codes per byte of text at the median"
    return findings or [Finding("ok", "pace", message)]
