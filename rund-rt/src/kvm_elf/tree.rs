//! A guest's processes, as the host sees them: a monitor and its descendants.

use std::collections::HashMap;
use std::fs;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Numbers of all processes, by their parents'.
fn by_parent() -> HashMap<i32, Vec<i32>> {
    let mut all: HashMap<i32, Vec<i32>> = HashMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse() else {
            continue;
        };
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // The name, in parentheses, may hold anything; behind it come the state and the parent.
        let parent = stat
            .rsplit_once(')')
            .and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse().ok());
        if let Some(parent) = parent {
            all.entry(parent).or_default().push(pid);
        }
    }
    all
}

fn descendants(root: i32) -> Vec<i32> {
    let by_parent = by_parent();
    let mut found = Vec::new();
    let mut left = vec![root];
    while let Some(pid) = left.pop() {
        let children = by_parent.get(&pid).map_or(&[][..], Vec::as_slice);
        found.extend_from_slice(children);
        left.extend_from_slice(children);
    }
    found
}

/// Stops `root` and all its descendants.
pub(super) fn stop(root: i32) {
    let mut stopped = vec![root];
    let _gone = kill(Pid::from_raw(root), Signal::SIGSTOP);
    // What is stopped makes no more, and what has ended keeps its number, since nobody waits for it.
    loop {
        let new: Vec<i32> = descendants(root)
            .into_iter()
            .filter(|pid| !stopped.contains(pid))
            .collect();
        if new.is_empty() {
            return;
        }
        for pid in new {
            let _gone = kill(Pid::from_raw(pid), Signal::SIGSTOP);
            stopped.push(pid);
        }
    }
}

/// Lets them go on.
pub(super) fn resume(root: i32) {
    for pid in descendants(root).into_iter().chain([root]) {
        let _gone = kill(Pid::from_raw(pid), Signal::SIGCONT);
    }
}
