//! The log: records of the hosts, entries, and how both are written so that a crash at any moment
//! leaves one state or the next.

use std::cmp::Ordering;
use std::ops::Range;
use std::sync::atomic::{self, AtomicBool};

use crate::catalog::Catalog;
use crate::error::{Error, Result};
use crate::flush::Step;
use crate::layout::{ENTRY, Entry, HALF, HostState, Operation, RECORDS, Record, Seed, Superblock};
use crate::medium::Medium;
use crate::{Epoch, HostId};

/// What is lost at once where a page is.
const PAGE: u64 = 4096;
/// How far behind the end of a log is looked for entries that damaged ones hide: sixteen pages. What
/// is lost at once is a line, or a page of sixteen entries.
const LOOK_AHEAD: u64 = 256;
/// How often reading begins again because a writer began a new arena meanwhile.
const TRIES: usize = 1000;

/// The log of a pool, on a medium that maps everything before the extents.
#[derive(Debug)]
pub(crate) struct Log {
    pub(crate) medium: Box<dyn Medium>,
    pub(crate) superblock: Superblock,
    pub(crate) seed: Seed,
    pub(crate) place: String,
    /// Whether no other host writes, and all that one ever wrote was read.
    is_alone: AtomicBool,
}

/// How far a log has been read, and what it said.
#[derive(Debug, Clone)]
pub(crate) struct State {
    pub(crate) record: Record,
    /// Entries read of the arena.
    pub(crate) position: u64,
    pub(crate) catalog: Catalog,
    /// Entries of which one half is damaged.
    pub(crate) damaged: Vec<u64>,
}

impl State {
    /// A state that no log has, so that the first look reads everything.
    pub(crate) fn unread(superblock: &Superblock) -> Self {
        Self {
            record: Record::idle(u16::MAX),
            position: 0,
            catalog: Catalog::new(superblock.data(), 1),
            damaged: Vec::new(),
        }
    }

    /// Of the next entry.
    pub(crate) fn sequence(&self) -> u64 {
        self.record.first_sequence.saturating_add(self.position)
    }
}

/// What a host's two copies of its record say.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Records {
    pub(crate) record: Record,
    /// Copies that do not say it.
    pub(crate) differing: usize,
}

/// An entry that was read.
pub(crate) struct Read {
    pub(crate) entry: Entry,
    /// Halves that are not it.
    pub(crate) damaged: [bool; 2],
}

/// Whether the log was read before up to where it is read on from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    /// What was there then is known: whatever damage there is came since.
    Before,
    /// What lies behind its end is looked through.
    Never,
}

impl Log {
    pub(crate) fn new(medium: Box<dyn Medium>, superblock: Superblock, place: String) -> Self {
        Self {
            medium,
            superblock,
            seed: superblock.seed(),
            place,
            is_alone: AtomicBool::new(false),
        }
    }

    /// From now on only this host writes here: its processes see each other's stores as they are, and
    /// what it has in its caches is what is there.
    pub(crate) fn is_only_this_hosts(&self) {
        self.is_alone.store(true, atomic::Ordering::Relaxed);
    }

    /// Makes what other hosts have written visible.
    fn acquire(&self, range: Range<u64>, step: Step) -> Result<()> {
        if self.is_alone.load(atomic::Ordering::Relaxed) {
            return Ok(());
        }
        self.medium.invalidate(range, step)
    }

    fn corrupt(&self, what: impl Into<String>) -> Error {
        Error::corrupt(&self.place, what)
    }

    /// One copy of a record, if it is valid.
    fn copy(&self, host: u16, copy: usize) -> Result<Option<Record>> {
        let at = self.superblock.area(host) + RECORDS[copy];
        let mut bytes = [0; Record::SIZE];
        let line = at..at + Record::SIZE as u64;
        self.acquire(line, Step::AcquireRecord)?;
        self.medium.load(at, &mut bytes)?;
        let record = Record::decode(&bytes, self.seed);
        Ok(record.filter(|record| record.host == host))
    }

    /// A host's record. The first copy is written first: where it is valid it is the later one.
    pub(crate) fn record(&self, host: u16) -> Result<Record> {
        // A line that is read while it is written is neither: the second look finds it whole, or
        // finds that a crash left it so.
        for _ in 0..2 {
            for copy in 0..2 {
                if let Some(record) = self.copy(host, copy)? {
                    return Ok(record);
                }
            }
        }
        Err(self.corrupt(format!("the record of {}", HostId(host))))
    }

    /// As [`Log::record`], with both copies looked at.
    pub(crate) fn record_and_copies(&self, host: u16) -> Result<Records> {
        let record = self.record(host)?;
        let mut differing = 0;
        for copy in 0..2 {
            differing += usize::from(self.copy(host, copy)? != Some(record));
        }
        Ok(Records { record, differing })
    }

    pub(crate) fn records(&self) -> Result<Vec<Record>> {
        (0..self.superblock.hosts)
            .map(|host| self.record(host))
            .collect()
    }

    /// The active record with the highest epoch.
    pub(crate) fn current(&self) -> Result<Record> {
        if self.superblock.hosts == 1 {
            let record = self.record(0)?;
            return match record.state {
                HostState::Active => Ok(record),
                _ => Err(self.corrupt("the record of the writer")),
            };
        }
        self.records()?
            .into_iter()
            .filter(|record| record.state == HostState::Active)
            .max_by(later)
            .ok_or_else(|| self.corrupt("the record of the writer"))
    }

    /// Writes both copies of a record, one after the other, so that one is whole at any moment.
    pub(crate) fn write_record(&self, record: &Record) -> Result<()> {
        let bytes = record.encode(self.seed);
        for (copy, step) in [(0, Step::RecordFirst), (1, Step::RecordSecond)] {
            let at = self.superblock.area(record.host) + RECORDS[copy];
            self.medium.store(at, &bytes)?;
            self.medium.write_back(at..at + bytes.len() as u64, step)?;
        }
        Ok(())
    }

    /// Reads the entry at `index` of a record's arena, if there is one.
    pub(crate) fn read(&self, record: &Record, index: u64) -> Result<Option<Read>> {
        let at = self.superblock.entry(record.host, record.turn, index);
        self.acquire(at..at + ENTRY, Step::AcquireEntry)?;
        let sequence = record.first_sequence.saturating_add(index);
        let mut found = None;
        let mut damaged = [true; 2];
        let mut bytes = [[0; HALF as usize]; 2];
        self.medium.load(at, bytes.as_flattened_mut())?;
        for (half, bytes) in bytes.iter().enumerate() {
            // Before the crc, which is most of the work: the end of a log is looked at often.
            if bytes[..8] != sequence.to_le_bytes() {
                continue;
            }
            let Some(entry) = Entry::decode(bytes, self.seed) else {
                continue;
            };
            if entry.epoch == record.epoch && entry.turn == record.turn {
                damaged[half] = false;
                found.get_or_insert(entry);
            }
        }
        Ok(found.map(|entry| Read { entry, damaged }))
    }

    /// Writes an entry where it belongs, into both of its halves.
    fn write(&self, record: &Record, index: u64, operation: Operation) -> Result<()> {
        let entry = Entry {
            sequence: record.first_sequence.saturating_add(index),
            epoch: record.epoch,
            turn: record.turn,
            operation,
        };
        let half = entry.encode(self.seed);
        let at = self.superblock.entry(record.host, record.turn, index);
        self.medium.store(at, [half, half].as_flattened())
    }

    /// Writes the halves of an entry that are damaged from the one that is not.
    pub(crate) fn mend(&self, record: &Record, index: u64, read: &Read) -> Result<()> {
        let at = self.superblock.entry(record.host, record.turn, index);
        let half = read.entry.encode(self.seed);
        for (i, damaged) in read.damaged.iter().enumerate() {
            if *damaged {
                self.medium.store(at + HALF * i as u64, &half)?;
            }
        }
        self.medium.write_back(at..at + ENTRY, Step::Entry)
    }

    /// Appends an operation to the arena of `state`, and applies it. There is room, and the catalog
    /// has nothing against it: the caller has looked.
    pub(crate) fn append(&self, state: &mut State, operation: Operation) -> Result<()> {
        state
            .catalog
            .apply(&operation)
            .map_err(|why| self.corrupt(format!("the catalog: {why}")))?;
        let at = self
            .superblock
            .entry(state.record.host, state.record.turn, state.position);
        self.write(&state.record, state.position, operation)?;
        state.position += 1;
        self.medium.write_back(at..at + ENTRY, Step::Entry)
    }

    /// Begins a new arena of `host` with what `state` says, for `epoch`. Until the record is written
    /// the old arena holds.
    pub(crate) fn begin_turn(&self, state: &mut State, host: u16, epoch: Epoch) -> Result<()> {
        // One at least has to be left, or nothing could ever be removed again.
        let weight = state.catalog.weight();
        if weight >= self.superblock.entries {
            let most = self.superblock.entries;
            let what =
                format!("the log, which names {weight} extents in arenas of {most} entries,");
            return Err(self.corrupt(what));
        }
        let own = self.record(host)?;
        let next = |number: u64| {
            let last = || self.corrupt(format!("the record of {}", HostId(host)));
            number.checked_add(1).ok_or_else(last)
        };
        let record = Record {
            generation: next(own.generation)?,
            epoch: epoch.0,
            turn: next(own.turn)?,
            first_sequence: state.sequence(),
            next_generation: state.catalog.next_generation(),
            checkpoint: u32::try_from(weight).map_err(|_| self.corrupt("the catalog"))?,
            host,
            state: HostState::Active,
            claim: 0,
        };
        let mut index = 0;
        for operation in state.catalog.checkpoint() {
            self.write(&record, index, operation)?;
            index += 1;
        }
        // What a crash in an earlier attempt left behind does not continue this one.
        if index < self.superblock.entries {
            let at = self.superblock.entry(host, record.turn, index);
            self.medium.store(at, &[0; ENTRY as usize])?;
            index += 1;
        }
        let from = self.superblock.entry(host, record.turn, 0);
        self.medium
            .write_back(from..from + index * ENTRY, Step::Arena)?;
        self.write_record(&record)?;
        state.position = record.checkpoint.into();
        state.record = record;
        state.damaged.clear();
        Ok(())
    }

    /// Reads on from where `state` is; from the beginning where another arena is in use now.
    pub(crate) fn refresh(&self, state: &mut State) -> Result<()> {
        for _ in 0..TRIES {
            let record = self.current()?;
            let known = &state.record;
            let same = (record.host, record.turn, record.epoch)
                == (known.host, known.turn, known.epoch)
                && record.first_sequence == known.first_sequence;
            let before = state.position;
            let read = if same {
                self.advance(state, Seen::Before)
            } else {
                self.replay(record).map(|new| *state = new)
            };
            if same && state.position == before && read.is_ok() {
                return read;
            }
            // What was read while a writer began another arena, and then one over it, is nothing.
            let now = self.current()?;
            if (now.host, now.turn, now.epoch) == (record.host, record.turn, record.epoch) {
                return read;
            }
        }
        Err(Error::Busy {
            what: "the log",
            waited: std::time::Duration::ZERO,
        })
    }

    /// Reads an arena from its beginning.
    pub(crate) fn replay(&self, record: Record) -> Result<State> {
        if u64::from(record.checkpoint) > self.superblock.entries {
            return Err(self.corrupt(format!("the record of {}", HostId(record.host))));
        }
        let mut state = State {
            record,
            position: 0,
            catalog: Catalog::new(self.superblock.data(), record.next_generation),
            damaged: Vec::new(),
        };
        self.advance(&mut state, Seen::Never)?;
        Ok(state)
    }

    fn advance(&self, state: &mut State, seen: Seen) -> Result<()> {
        while state.position < self.superblock.entries {
            let index = state.position;
            let mut read = self.read(&state.record, index)?;
            if read.is_none() {
                let hidden = index < state.record.checkpoint.into()
                    || match seen {
                        Seen::Before => self.is_any_near(&state.record, index)?,
                        Seen::Never => self.any_behind(&state.record, index + 1)?,
                    };
                if !hidden {
                    return Ok(());
                }
                // It may have been written while those behind it were looked at.
                read = self.read(&state.record, index)?;
                if read.is_none() {
                    return Err(self.corrupt(format!("entry {index} of the log")));
                }
            }
            if let Some(Read { entry, damaged }) = read {
                state
                    .catalog
                    .apply(&entry.operation)
                    .map_err(|why| self.corrupt(format!("entry {index} of the log: {why}")))?;
                state.position += 1;
                if damaged.contains(&true) {
                    state.damaged.push(index);
                }
            }
        }
        Ok(())
    }

    /// Whether the entry behind `index` is valid, or the first one of the next page: of a line or a
    /// page that was lost since, and of nothing larger, one of them tells.
    fn is_any_near(&self, record: &Record, index: u64) -> Result<bool> {
        let at = self.superblock.entry(record.host, record.turn, index);
        let page = at / PAGE * PAGE + PAGE;
        for near in [index + 1, index + (page - at).div_ceil(ENTRY)] {
            if near < self.superblock.entries
                && self.may_be_there(record, near)?
                && self.read(record, near)?.is_some()
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether a half of an entry has the right number: this is asked before every change, and of what
    /// is hardly ever there.
    fn may_be_there(&self, record: &Record, index: u64) -> Result<bool> {
        let at = self.superblock.entry(record.host, record.turn, index);
        let sequence = record.first_sequence.saturating_add(index).to_le_bytes();
        for at in [at, at + HALF] {
            let mut number = [0; 8];
            self.acquire(at..at + 8, Step::AcquireEntry)?;
            self.medium.load(at, &mut number)?;
            if number == sequence {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether any entry from `index` on is valid, as far as is looked.
    fn any_behind(&self, record: &Record, index: u64) -> Result<bool> {
        let end = self.superblock.entries.min(index + LOOK_AHEAD);
        let mut bytes = vec![0; (end.saturating_sub(index) * ENTRY) as usize];
        let at = self.superblock.entry(record.host, record.turn, index);
        let range = at..at + bytes.len() as u64;
        self.acquire(range, Step::AcquireEntry)?;
        self.medium.load(at, &mut bytes)?;
        let (halves, _) = bytes.as_chunks::<{ HALF as usize }>();
        for (i, half) in halves.iter().enumerate() {
            let later = index + i as u64 / 2;
            let sequence = record.first_sequence.saturating_add(later);
            // Most are zeroes, or of an earlier arena: one that may be it is read in full.
            if half[..8] == sequence.to_le_bytes() && self.read(record, later)?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether a record ends the right of `host` to write with `epoch`. `now` is what was just read.
    pub(crate) fn fence_after(&self, now: &State, host: u16, epoch: Epoch) -> Result<()> {
        if self.superblock.hosts == 1 && now.record.host == host && now.record.epoch == epoch.0 {
            return Ok(());
        }
        self.fence(host, epoch)
    }

    /// Whether a record ends the right of `host` to write with `epoch`.
    pub(crate) fn fence(&self, host: u16, epoch: Epoch) -> Result<()> {
        for record in self.records()? {
            if record.state != HostState::Idle && record.latest() > epoch.0 {
                return Err(Error::Fenced {
                    ours: epoch,
                    theirs: Epoch(record.latest()),
                    by: HostId(record.host),
                });
            }
            let same = record.latest() == epoch.0 && record.host != host;
            if record.state != HostState::Idle && same {
                return Err(Error::EpochTaken {
                    epoch,
                    by: HostId(record.host),
                });
            }
        }
        Ok(())
    }
}

/// By epoch. No two hosts have the same one, unless whoever gives them out gave one out twice.
fn later(a: &Record, b: &Record) -> Ordering {
    (a.epoch, a.host).cmp(&(b.epoch, b.host))
}
