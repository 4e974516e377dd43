//! Processes that share a pool with the tour.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use carlsbad_kit::child;
use carlsbad_types::ByteSize;
use directcxl::{Epoch, FileHdm, Handle, Namespace, NamespaceOptions, Pool, Role};
use serde::{Deserialize, Serialize};

pub(super) const ROLE: &str = "directcxl worker";

/// What a worker is to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Order {
    /// Attach to what a handle names, and keep it.
    Own { path: PathBuf, handle: Vec<u8> },
    /// Make and remove namespaces until it is killed.
    Change { path: PathBuf, round: usize },
}

/// Plays the worker, if this process was started as one.
pub(crate) fn play() -> Option<Result<()>> {
    child::arguments::<Order>(ROLE).map(|order| match order {
        Order::Own { path, handle } => own(&path, &handle),
        Order::Change { path, round } => change(&path, round),
    })
}

fn own(path: &Path, handle: &[u8]) -> Result<()> {
    let bytes = handle.try_into().context("a handle has 48 bytes")?;
    let pool = Pool::open(FileHdm::open_read_only(path)?, Role::Reader)?;
    let memory = pool.resolve(Handle::from_bytes(bytes))?;
    child::tell(format!("at {}", memory.as_ptr().as_ptr().addr()));
    child::wait_for_parent();
    Ok(())
}

/// The `i`th change of a round: a namespace, and whether it is made or removed.
fn nth(round: usize, i: usize) -> (String, u64, bool) {
    let slot = i % 16;
    let content = (round as u64) << 32 | (i / 32 * 16 + slot) as u64;
    (format!("slot {slot}"), content, (i / 16).is_multiple_of(2))
}

fn change(path: &Path, round: usize) -> Result<()> {
    let pool = Pool::open(FileHdm::open(path)?, Role::Writer(Epoch::CURRENT))?;
    for i in 0.. {
        let (name, content, make) = nth(round, i);
        if make {
            let namespace = pool.create(&name, ByteSize::mib(2), NamespaceOptions::default())?;
            namespace.write(0, &content.to_le_bytes())?;
            namespace.publish(0..8)?;
        } else {
            pool.remove(&name)?;
        }
        child::tell(i);
    }
    Ok(())
}

/// What a namespace of a worker holds.
pub(super) fn content(namespace: &Namespace) -> Result<u64> {
    let mut bytes = [0; 8];
    namespace.read(0, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// What must be there after a worker was killed.
pub(super) struct Held {
    pub(super) certain: BTreeMap<String, u64>,
}

/// What the changes that a worker told of leave behind, without those that the one it was doing may
/// have changed.
pub(super) fn replay(told: &[String], round: usize) -> Held {
    let mut certain = BTreeMap::new();
    for i in 0..told.len() {
        let (name, content, make) = nth(round, i);
        if make {
            certain.insert(name, content);
        } else {
            certain.remove(&name);
        }
    }
    // It may have done one more, and not said so.
    certain.remove(&nth(round, told.len()).0);
    Held { certain }
}
