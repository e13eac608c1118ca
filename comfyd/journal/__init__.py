"""The journal: accepted async jobs, webhooks that are owed, dead letters; and the traces of all jobs' files."""

from comfyd.journal.database import Database
from comfyd.journal.journal import Journal, JournalTimes, serve_journal
from comfyd.journal.rows import JobFilter, JobIdTaken, JobRow, JournalLocked, JournalUnavailable, WebhookRow
from comfyd.journal.traces import Trace, Traces

__all__ = [
    "Database",
    "JobFilter",
    "JobIdTaken",
    "JobRow",
    "Journal",
    "JournalLocked",
    "JournalTimes",
    "JournalUnavailable",
    "Trace",
    "Traces",
    "WebhookRow",
    "serve_journal",
]
