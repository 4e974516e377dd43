//! A key-value store in one namespace, used by several processes, any of which may be killed.
//!
//! `cargo run --release -p directcxl --example key_value [PLACE [ROUNDS]]`: four processes count words
//! into one table while a fifth is killed over and over; in the end every count is right. PLACE is a
//! new file on tmpfs, hugetlbfs or any file system, or a device such as `/dev/dax0.0`.

#![allow(clippy::print_stdout, reason = "what it prints is what it is for")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use carlsbad_types::ByteSize;
use directcxl::heap::{Heap, HeapOptions, Place};
use directcxl::{
    Backend, DevDax, Epoch, FileHdm, FormatOptions, Namespace, NamespaceOptions, Pool, Result, Role,
};

/// Chains of the table; each begins at a word of one block.
const BUCKETS: u64 = 1024;
/// Where a node has the next one, its count, the length of its key, and its key.
const NEXT: u64 = 0;
const COUNT: u64 = 8;
const LENGTH: u64 = 16;
const KEY: u64 = 24;
/// How often each process counts each word, where the command line does not say.
const ROUNDS: usize = 2000;
/// Processes that are killed at least.
const KILLS: usize = 20;
/// What the command line of a worker begins with.
const WORKER: &str = "--worker";
const WORDS: [&str; 6] = [
    "direct",
    "access",
    "high",
    "performance",
    "memory",
    "disaggregation",
];

/// Words and how often each was counted.
struct Table {
    memory: Namespace,
    heap: Heap,
    buckets: u64,
}

impl Table {
    fn open(pool: &Pool) -> Result<Self> {
        let memory = pool.attach("table")?;
        let heap = Heap::open(&memory)?;
        let buckets = memory.atomic(heap.root(0)?.0)?.load(Ordering::Acquire);
        Ok(Self {
            memory,
            heap,
            buckets,
        })
    }

    /// Adds one to a word's count, and the word where it is new.
    fn count(&self, word: &str) -> Result<()> {
        let bucket = self.bucket(word);
        loop {
            let first = self.memory.atomic(bucket)?.load(Ordering::Acquire);
            if let Some(node) = self.find(first, word)? {
                self.memory
                    .atomic(node + COUNT)?
                    .fetch_add(1, Ordering::AcqRel);
                return Ok(());
            }
            // Whole before anybody can find it. Where this process is killed before that, or another
            // was faster, the node is nobody's; a real store would keep it in a root until then.
            let node = self.heap.allocate(ByteSize::new(KEY + word.len() as u64))?;
            self.memory.write(node.0 + NEXT, &first.to_le_bytes())?;
            self.memory.write(node.0 + COUNT, &0u64.to_le_bytes())?;
            self.memory
                .write(node.0 + LENGTH, &(word.len() as u64).to_le_bytes())?;
            self.memory.write(node.0 + KEY, word.as_bytes())?;
            let added = self.memory.atomic(bucket)?.compare_exchange(
                first,
                node.0,
                Ordering::AcqRel,
                Ordering::Acquire,
            );
            if added.is_err() {
                self.heap.free(node)?;
            }
        }
    }

    fn get(&self, word: &str) -> Result<u64> {
        let first = self
            .memory
            .atomic(self.bucket(word))?
            .load(Ordering::Acquire);
        match self.find(first, word)? {
            Some(node) => Ok(self.memory.atomic(node + COUNT)?.load(Ordering::Acquire)),
            None => Ok(0),
        }
    }

    fn bucket(&self, word: &str) -> u64 {
        let hash = word.bytes().fold(5381u64, |hash, byte| {
            hash.wrapping_mul(33) ^ u64::from(byte)
        });
        self.buckets + 8 * (hash % BUCKETS)
    }

    fn find(&self, mut node: u64, word: &str) -> Result<Option<u64>> {
        while node != 0 {
            let mut length = [0; 8];
            self.memory.read(node + LENGTH, &mut length)?;
            if u64::from_le_bytes(length) == word.len() as u64 {
                let mut key = vec![0; word.len()];
                self.memory.read(node + KEY, &mut key)?;
                if key == word.as_bytes() {
                    return Ok(Some(node));
                }
            }
            node = self.memory.atomic(node + NEXT)?.load(Ordering::Acquire);
        }
        Ok(None)
    }
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let worker = arguments.first().is_some_and(|first| first == WORKER);
    if worker {
        arguments.remove(0);
    }
    let place = arguments.first().map_or_else(
        || PathBuf::from(format!("/dev/shm/directcxl-example-{}", std::process::id())),
        PathBuf::from,
    );
    let rounds = arguments
        .get(1)
        .map_or(Ok(ROUNDS), |rounds| rounds.parse())?;
    if worker {
        return Ok(work(&place, rounds)?);
    }
    let pool = if is_device(&place) {
        Pool::format(DevDax::open(&place)?, FormatOptions::default())?
    } else {
        let file = FileHdm::create(&place, ByteSize::mib(32))?;
        Pool::format(file, FormatOptions::default())?
    };
    let outcome = run(&pool, &place, rounds);
    if !is_device(&place) {
        std::fs::remove_file(&place)?;
    }
    outcome
}

fn is_device(place: &Path) -> bool {
    place.starts_with("/dev") && !place.starts_with("/dev/shm")
}

/// The memory, opened by another process.
fn open(place: &Path) -> Result<Arc<dyn Backend>> {
    Ok(if is_device(place) {
        Arc::new(DevDax::open(place)?)
    } else {
        Arc::new(FileHdm::open(place)?)
    })
}

fn run(
    pool: &Pool,
    place: &Path,
    rounds: usize,
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let memory = pool.create("table", ByteSize::mib(8), NamespaceOptions::default())?;
    let heap = Heap::format(&memory, HeapOptions::default())?;
    let buckets: Place = heap.allocate_into(ByteSize::new(8 * BUCKETS), heap.root(0)?)?;
    memory.write(buckets.0, &[0; 8 * BUCKETS as usize])?;

    let start = || -> std::io::Result<Child> {
        Command::new(std::env::current_exe()?)
            .arg(WORKER)
            .arg(place)
            .arg(rounds.to_string())
            .spawn()
    };
    let mut workers = Vec::new();
    for _ in 0..4 {
        workers.push(start()?);
    }
    let mut kills = 0;
    while kills < KILLS || matches!(workers[0].try_wait(), Ok(None)) {
        let mut victim = start()?;
        std::thread::sleep(std::time::Duration::from_millis(3));
        victim.kill()?;
        victim.wait()?;
        kills += 1;
    }
    for worker in &mut workers {
        if !worker.wait()?.success() {
            return Err("a worker failed".into());
        }
    }
    let table = Table::open(pool)?;
    let stats = heap.check()?;
    println!(
        "{kills} processes killed; {} blocks in use, heap whole",
        stats.blocks
    );
    for word in WORDS {
        let count = table.get(word)?;
        // Each of the four counted every word so often; the killed ones added what they got to.
        if count < 4 * rounds as u64 {
            return Err(format!("{word} was counted {count} times only").into());
        }
        println!("{word:16} {count}");
    }
    Ok(())
}

fn work(place: &Path, rounds: usize) -> Result<()> {
    let pool = Pool::open_shared(open(place)?, Role::Writer(Epoch::CURRENT))?;
    let table = Table::open(&pool)?;
    for _ in 0..rounds {
        for word in WORDS {
            table.count(word)?;
        }
    }
    Ok(())
}
