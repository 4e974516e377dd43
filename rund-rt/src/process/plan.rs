//! What the helper is told, and under which numbers it finds its descriptors.

use std::os::fd::RawFd;

use serde::{Deserialize, Serialize};

/// The helper's `argv[0]`, by which a program that was started again knows what it is.
pub(super) const NAME: &str = "rund-process-helper";

/// Where the helper finds what. 0, 1 and 2 are the sandbox's own, where they are not captured.
pub(super) const PLAN: RawFd = 3;
/// Closed by the sandbox's `exec`; before that it says what went wrong.
pub(super) const READY: RawFd = 4;
/// A socket of packets: here the owner says what to do, and the helper how the program ended. Its
/// end is the owner's end.
pub(super) const STATUS: RawFd = 5;
pub(super) const PROGRAM: RawFd = 6;
/// The directory that becomes `/`.
pub(super) const ROOT: RawFd = 7;
/// What was captured of standard output and error.
pub(super) const CAPTURED: [RawFd; 2] = [8, 9];
/// The first number that the helper has no use for.
pub(super) const END: RawFd = 10;

/// From the owner, first: the helper is in its control group and may begin. What it forks before
/// would be in no group.
pub(super) const BEGIN: u8 = b'b';
/// From the owner: stop all that runs, or let it run again. The helper answers [`DONE`].
pub(super) const STOP: u8 = b's';
pub(super) const CONTINUE: u8 = b'c';
/// From the helper: it is done; or, before a serialised [`End`], the program has ended.
pub(super) const DONE: u8 = b'd';
pub(super) const ENDED: u8 = b'e';
/// No packet is longer.
pub(super) const PACKET: usize = 64;

/// What becomes `/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Root {
    /// An empty directory.
    Empty,
    /// The directory behind the descriptor, which nobody may write to.
    ReadOnly,
    /// The directory behind the descriptor, the sandbox's own.
    Writable,
}

/// What the helper does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Plan {
    pub(super) root: Root,
    pub(super) args: Vec<Vec<u8>>,
    pub(super) env: Vec<Vec<u8>>,
    pub(super) cwd: Vec<u8>,
    pub(super) hostname: String,
    /// Whether standard output and error are captured.
    pub(super) capture: [bool; 2],
    /// How much of each.
    pub(super) output_bytes: u64,
    pub(super) run_time_ms: Option<u64>,
    /// User and group outside, where the helper has no rights but those of a user namespace.
    pub(super) user: Option<(u32, u32)>,
}

/// How the program ended: what the helper says on [`STATUS`], once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct End {
    /// As `wait` gives it.
    pub(super) raw: i32,
    pub(super) timed_out: bool,
    pub(super) truncated: bool,
}
