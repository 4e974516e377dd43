//! What owner, zygote and virtual machine monitors say to each other.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::backend::{Reuse, SnapshotPoint, Status};

use super::template::State;
use super::upper::Secret;

/// From the owner to a zygote.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToZygote {
    /// The first message. Descriptors: the read-only layer, where there is one; the directory for
    /// writable layers, where there is one.
    Begin {
        lower: bool,
        upper: bool,
        secret: Secret,
    },
    /// Make a template. Descriptors: the program, an empty file in memory.
    Build(Build),
    /// Clone this template from now on. Descriptor: its pages.
    Adopt(Box<State>),
    /// Start a monitor. Descriptor: its end of a channel.
    Spawn,
}

/// A template to be made.
#[derive(Debug, Serialize, Deserialize)]
pub struct Build {
    pub program_path: Vec<u8>,
    pub args: Vec<Vec<u8>>,
    pub env: Vec<Vec<u8>>,
    pub cwd: Vec<u8>,
    pub memory: u64,
    pub snapshot: SnapshotPoint,
    pub deadline: Duration,
}

/// From a zygote to the owner.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromZygote {
    /// It is confined, by these means.
    Ready(Confinement),
    /// The template is made.
    Built(Box<State>),
    /// The template can be cloned.
    Adopted,
    /// A monitor was started. Descriptor: its process.
    Spawned(i32),
    /// It could not do what it was asked.
    Failed(Failure),
}

/// Why not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Failure {
    /// KVM cannot be used.
    Kvm(String),
    /// The program cannot be run.
    Program(String),
    /// The program did not get to the point of the snapshot.
    Snapshot(String),
    /// Something else.
    Other(String),
}

/// What is in force around a zygote and all that it starts.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Confinement {
    /// The filter of system calls.
    pub seccomp: bool,
    /// Whether files outside of the layers are out of reach by landlock: all, some, or none.
    pub landlock: String,
    /// Whether the capabilities of root are given up.
    pub capabilities_dropped: bool,
    /// Whether guests run at the processor's privilege 0 after a system call entered
    /// (a hardware virtual machine) or at 3 (PVM).
    pub ring0_entry: bool,
}

/// From the owner to a monitor.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToMonitor {
    /// What it cannot open itself. Descriptor: its own page map, where there is one.
    Equip,
    /// Run a clone. Descriptors: those that [`Input`] and [`Destination`] name, in their order.
    Start(Box<Start>),
}

/// A clone to be run.
#[derive(Debug, Serialize, Deserialize)]
pub struct Start {
    /// When it was asked for: the monotonic clock, in nanoseconds.
    pub asked: u64,
    pub host_name: String,
    pub pid: i32,
    pub args: Option<Vec<Vec<u8>>>,
    pub env: Option<Vec<Vec<u8>>>,
    pub cwd: Option<Vec<u8>>,
    pub stdin: Input,
    pub stdout: Destination,
    pub stderr: Destination,
    pub run_time: Option<Duration>,
    pub upper: u64,
    pub output: u64,
    pub processes: u32,
    pub reuse: Reuse,
    /// Compare everything with the template after the reset.
    pub verify: bool,
}

/// Standard input of a clone.
#[derive(Debug, Serialize, Deserialize)]
pub enum Input {
    Null,
    Bytes(Vec<u8>),
    Descriptor,
}

/// Standard output or error of a clone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Destination {
    Null,
    Captured,
    Descriptor,
}

/// From a monitor to the owner.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromMonitor {
    /// Its machine is the template.
    Ready,
    /// A part of the captured output.
    Output(u8, Vec<u8>),
    /// The clone has ended.
    Ended(Box<Ended>),
    /// Its machine is the template again.
    Reset {
        took: Duration,
        pages: u64,
        /// What differs from the template, where that was asked.
        differences: Vec<String>,
    },
    /// It cannot go on, and ends.
    Failed(String),
}

/// The end of a clone.
#[derive(Debug, Serialize, Deserialize)]
pub struct Ended {
    pub status: Status,
    /// The last of the captured output.
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub truncated: bool,
    pub start: Duration,
    pub run: Duration,
    pub exits: u64,
    pub served_inside: u64,
    pub split_rootfs: bool,
    /// Whether the machine had served before.
    pub recycled: bool,
    /// Whether the monitor goes on: it will say that its machine is reset.
    pub goes_on: bool,
    /// Bytes in its writable layer.
    pub upper: u64,
}
