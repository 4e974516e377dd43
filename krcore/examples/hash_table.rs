//! A hash table that lives in one process and is used by others, which attach to the node daemon,
//! connect, use it by one-sided READ and compare-and-swap, and end: nobody serves requests.
//!
//! `cargo run -p krcore --example hash_table --features daemon`
#![allow(clippy::print_stdout, reason = "an example shows what it does")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use krcore::{
    Access, ByteSize, Config, Daemon, DaemonOptions, Error, MemoryRegion, Node, NodeId, Op, RKey,
    RemoteSlice, Result, ShmFabric, Status, VirtualQueue, WorkRequest,
};

const LIMIT: Duration = Duration::from_secs(5);
/// Each a word of key, 0 where it is free, and a word of value.
const SLOTS: u64 = 1024;
const PROCESSES: u64 = 8;
const KEYS: u64 = 50;

/// The table, as a client sees it: a key of remote memory.
struct Table<'a> {
    queue: VirtualQueue,
    local: &'a std::sync::Arc<MemoryRegion>,
    key: RKey,
}

impl Table<'_> {
    fn run(&mut self, op: Op, offset: u64) -> Result<u64> {
        let remote = RemoteSlice {
            key: self.key,
            offset,
        };
        let work = WorkRequest::new(0, op, self.local.slice(0, 8), remote);
        self.queue.post(&[work])?;
        let done = self.queue.wait(LIMIT)?;
        if done.status != Status::Success {
            return Err(Error::Failed {
                what: "an operation on the table",
                peer: self.queue.peer(),
                status: done.status,
            });
        }
        let mut word = [0; 8];
        let _inside = self.local.read(0, &mut word);
        Ok(u64::from_le_bytes(word))
    }

    /// Adds to the value of `key`, whoever else does.
    fn add(&mut self, key: u64, add: u64) -> Result<()> {
        let mut slot = key.wrapping_mul(0x9E37_79B9_7F4A_7C15) % SLOTS;
        loop {
            let taken = self.run(
                Op::CompareSwap {
                    expected: 0,
                    new: key,
                },
                slot * 16,
            )?;
            if taken == 0 || taken == key {
                return self.run(Op::FetchAdd { add }, slot * 16 + 8).map(drop);
            }
            slot = (slot + 1) % SLOTS;
        }
    }

    fn get(&mut self, key: u64) -> Result<u64> {
        let mut slot = key.wrapping_mul(0x9E37_79B9_7F4A_7C15) % SLOTS;
        loop {
            let there = self.run(Op::Read, slot * 16)?;
            if there == key {
                return self.run(Op::Read, slot * 16 + 8);
            }
            if there == 0 {
                return Ok(0);
            }
            slot = (slot + 1) % SLOTS;
        }
    }
}

/// What a short-lived process does.
fn use_it(socket: &Path, key: RKey) -> Result<()> {
    let node = Node::attach(socket, LIMIT)?;
    let local = node.register(ByteSize::kib(4), Access::Local)?;
    let begun = Instant::now();
    let queue = node.connect(node.id(), LIMIT)?;
    let connected = begun.elapsed();
    let mut table = Table {
        queue,
        local: &local,
        key,
    };
    for key in 1..=KEYS {
        table.add(key, key)?;
    }
    println!("process {}: connected in {connected:?}", std::process::id());
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, socket, key] = &arguments[..] {
        use_it(Path::new(socket), RKey(key.parse()?))?;
        return Ok(());
    }
    // A daemon of its own, so that the example needs nothing; `krcored` is the same.
    let socket: PathBuf =
        std::env::temp_dir().join(format!("hash-table-{}.sock", std::process::id()));
    let node = Node::embedded(ShmFabric::new(), NodeId(1), Config::default())?;
    let _daemon = Daemon::start(&socket, node, DaemonOptions::default())?;

    let owner = Node::attach(&socket, LIMIT)?;
    let memory = owner.register(ByteSize::new(SLOTS * 16), Access::ReadWrite)?;
    let children: Vec<_> = (0..PROCESSES)
        .map(|_| {
            Command::new(std::env::current_exe()?)
                .arg(&socket)
                .arg(memory.key().0.to_string())
                .spawn()
        })
        .collect::<Result<_, _>>()?;
    for mut child in children {
        if !child.wait()?.success() {
            return Err("a process failed".into());
        }
    }
    let local = owner.register(ByteSize::kib(4), Access::Local)?;
    let mut table = Table {
        queue: owner.connect(owner.id(), LIMIT)?,
        local: &local,
        key: memory.key(),
    };
    for key in 1..=KEYS {
        let value = table.get(key)?;
        if value != key * PROCESSES {
            return Err(format!("key {key} has {value}").into());
        }
    }
    println!("{PROCESSES} processes added to {KEYS} keys, and every value is right");
    Ok(())
}
