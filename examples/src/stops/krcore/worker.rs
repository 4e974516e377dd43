//! The processes of the stop: a node daemon, the owner of a table, and its short-lived users.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};
use carlsbad_kit::child;
use krcore::{
    Access, ByteSize, Config, Daemon, DaemonOptions, Node, NodeId, Op, RKey, RemoteSlice,
    ShmFabric, Status, WorkRequest,
};
use serde::{Deserialize, Serialize};

pub(super) const ROLE: &str = "krcore worker";
pub(super) const LIMIT: Duration = Duration::from_secs(10);
/// Words of the table; one more is counted in.
pub(super) const WORDS: u64 = 4096;
/// How often each process adds.
pub(super) const ADDS: u64 = 2000;

/// What a worker is to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Order {
    /// Be the node daemon.
    Daemon { path: PathBuf },
    /// Lend a table.
    Owner { path: PathBuf },
    /// Connect, add, end.
    Add { path: PathBuf, key: u32 },
    /// Connect and read until killed.
    Busy { path: PathBuf, key: u32 },
}

/// Plays the worker, if this process was started as one.
pub(crate) fn play() -> Option<Result<()>> {
    child::arguments::<Order>(ROLE).map(|order| match order {
        Order::Daemon { path } => daemon(&path),
        Order::Owner { path } => owner(&path),
        Order::Add { path, key } => add(&path, RKey(key)),
        Order::Busy { path, key } => busy(&path, RKey(key)),
    })
}

/// What the owner writes at an index.
pub(super) fn word(index: u64) -> u64 {
    index.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x6B72
}

fn daemon(path: &Path) -> Result<()> {
    let node = Node::embedded(ShmFabric::new(), NodeId(1), Config::default())?;
    let _daemon = Daemon::start(path, node, DaemonOptions::default())?;
    child::tell("ready");
    child::wait_for_parent();
    Ok(())
}

fn owner(path: &Path) -> Result<()> {
    let node = Node::attach(path, LIMIT)?;
    let table = node.register(ByteSize::new(WORDS * 8 + 8), Access::ReadWrite)?;
    for index in 0..WORDS {
        ensure!(
            table.write(index * 8, &word(index).to_le_bytes()),
            "too small"
        );
    }
    child::tell(format!("key {}", table.key().0));
    child::wait_for_parent();
    Ok(())
}

fn add(path: &Path, key: RKey) -> Result<()> {
    let node = Node::attach(path, LIMIT)?;
    let local = node.register(ByteSize::kib(4), Access::Local)?;
    let mut queue = node.connect(node.id(), LIMIT)?;
    let remote = RemoteSlice {
        key,
        offset: WORDS * 8,
    };
    let add = WorkRequest::new(0, Op::FetchAdd { add: 1 }, local.slice(0, 8), remote);
    for _ in 0..ADDS {
        ensure!(queue.post(std::slice::from_ref(&add))? == 1, "no room");
        let status = queue.wait(LIMIT)?.status;
        ensure!(status == Status::Success, "{status}");
    }
    Ok(())
}

fn busy(path: &Path, key: RKey) -> Result<()> {
    let node = Node::attach(path, LIMIT)?;
    let local = node.register(ByteSize::kib(4), Access::Local)?;
    child::tell("ready");
    loop {
        let mut queue = node.connect(node.id(), LIMIT)?;
        let remote = RemoteSlice { key, offset: 0 };
        let read = WorkRequest::new(0, Op::Read, local.slice(0, 8), remote);
        queue.post(&vec![read; 50])?;
        queue.wait(LIMIT)?;
    }
}
