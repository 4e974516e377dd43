//! Under which conditions a figure was taken.

use std::fmt;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use carlsbad_kit::memory;
use carlsbad_types::ByteSize;
use serde::{Deserialize, Serialize};

use crate::shell;

/// How long the machine is looked at.
const LOOK: Duration = Duration::from_millis(1500);
/// More than this share of the processors' time taken by others is too busy to measure.
const BUSY: f64 = 0.15;
/// More than this share taken away by the hypervisor is too.
const STOLEN: f64 = 0.05;

/// Commit, command, machine, load.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Conditions {
    pub(crate) commit: String,
    pub(crate) command: String,
    pub(crate) machine: String,
    /// Share of the processors' time that others took just before.
    pub(crate) load: f64,
    /// Share of the processors' time that the hypervisor took away during the run.
    pub(crate) steal: f64,
}

impl Conditions {
    pub(crate) fn new(root: &Path, command: String, load: Load, clock: &Clock) -> Result<Self> {
        Ok(Self {
            commit: commit(root)?,
            command,
            machine: machine()?,
            load: rounded(load.busy),
            steal: rounded(clock.read()?.stolen),
        })
    }
}

fn rounded(share: f64) -> f64 {
    (share * 1000.0).round() / 1000.0
}

/// What others do to the machine, as shares of the processors' time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    busy: f64,
    stolen: f64,
}

impl Load {
    /// Looks for a second and a half.
    pub(crate) fn look() -> Result<Self> {
        let clock = Clock::start()?;
        std::thread::sleep(LOOK);
        clock.read()
    }

    pub(crate) fn is_busy(self) -> bool {
        self.busy > BUSY || self.stolen > STOLEN
    }
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:.0}% busy, {:.0}% stolen",
            self.busy * 100.0,
            self.stolen * 100.0
        )
    }
}

/// The processors' time from a moment on.
#[derive(Debug)]
pub(crate) struct Clock(Times);

#[derive(Debug, Clone, Copy)]
struct Times {
    total: u64,
    idle: u64,
    steal: u64,
}

impl Clock {
    pub(crate) fn start() -> Result<Self> {
        Times::read().map(Self)
    }

    pub(crate) fn read(&self) -> Result<Load> {
        let now = Times::read()?;
        let total = now.total.saturating_sub(self.0.total).max(1) as f64;
        let idle = now.idle.saturating_sub(self.0.idle) as f64 / total;
        let stolen = now.steal.saturating_sub(self.0.steal) as f64 / total;
        Ok(Load {
            busy: (1.0 - idle - stolen).max(0.0),
            stolen,
        })
    }
}

impl Times {
    fn read() -> Result<Self> {
        let text = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
        Ok(Self::parse(&text))
    }

    /// `cpu user nice system idle iowait irq softirq steal guest guest_nice`, in clock ticks.
    fn parse(text: &str) -> Self {
        let ticks: Vec<u64> = text
            .lines()
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .skip(1)
            .take(8)
            .map(|word| word.parse().unwrap_or(0))
            .collect();
        let at = |i: usize| ticks.get(i).copied().unwrap_or(0);
        Self {
            total: ticks.iter().sum(),
            idle: at(3) + at(4),
            steal: at(7),
        }
    }
}

fn commit(root: &Path) -> Result<String> {
    let git =
        |arguments: &[&str]| shell::output(Command::new("git").arg("-C").arg(root).args(arguments));
    let mut commit = git(&["rev-parse", "--short=12", "HEAD"])?.trim().to_owned();
    if !git(&["status", "--porcelain", "--untracked-files=no"])?
        .trim()
        .is_empty()
    {
        commit += " with changes";
    }
    Ok(commit)
}

/// Processor, cores, memory, kernel, compiler.
fn machine() -> Result<String> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
    let processor = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map_or("unknown processor", |rest| {
            rest.trim_start_matches([' ', '\t', ':'])
        });
    let cores = std::thread::available_parallelism()?;
    let memory = ByteSize::gib(memory::meminfo("MemTotal")?.get().div_ceil(1 << 30));
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let rustc = shell::output(Command::new("rustc").arg("--version"))?;
    Ok(format!(
        "{processor}, {cores} cores, {memory}, Linux {}, {}",
        release.trim(),
        rustc.split(" (").next().unwrap_or_default()
    ))
}

#[cfg(test)]
mod tests {
    use super::{Clock, Times};

    #[test]
    fn shares_are_of_the_time_that_passed() {
        let then = Times::parse("cpu  100 0 0 100 0 0 0 0 7 7\n");
        assert_eq!((then.total, then.idle, then.steal), (200, 100, 0));
        let load = Clock::start().unwrap().read().unwrap();
        assert!((0.0..=1.0).contains(&load.busy) && (0.0..=1.0).contains(&load.stolen));
    }
}
