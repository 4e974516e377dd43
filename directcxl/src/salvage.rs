//! What can still be read of a pool that is damaged beyond its copies.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use carlsbad_types::ByteSize;

use crate::backend::Backend;
use crate::catalog::bad_name;
use crate::check::Problem;
use crate::error::{Error, Result};
use crate::host::HostId;
use crate::layout::{ENTRY, EXTENT, Entry, Extent, HALF, HostState, Operation, Record};
use crate::log::Log;
use crate::medium::Access;
use crate::namespace::NamespaceInfo;
use crate::pool::Pool;
use crate::superblock;

/// What is left of a damaged pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Salvage {
    /// What is damaged.
    pub problems: Vec<Problem>,
    /// Entries of the log that can be read.
    pub entries: u64,
    /// What they name, in the order in which it lies in the device or file.
    pub namespaces: Vec<Salvaged>,
}

/// A namespace of a damaged pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Salvaged {
    /// What it was called, and where it lies.
    pub info: NamespaceInfo,
    /// Whether it was there to the end, with this length. Otherwise an entry that is lost may have
    /// removed it, and its memory may have been given to others.
    pub certain: bool,
}

/// An arena of the log, as far as it can be read.
#[derive(Debug, Default)]
struct Arena {
    /// By index.
    entries: BTreeMap<u64, Entry>,
    /// Entries at its beginning that a record vouches for; none where that is lost.
    checkpoint: Option<u64>,
}

impl Pool {
    /// Looks at a pool that cannot be opened any more, [`Error::Corrupt`], and lists what can be read
    /// of it. Changes nothing. The bytes of a namespace are where its [`NamespaceInfo`] says: a
    /// program that maps the device or file can copy them out, before it is formatted anew.
    ///
    /// # Errors
    /// Where both copies of the superblock are lost, without which nothing else can be read; where
    /// there is no pool, or the memory is gone.
    pub fn salvage(backend: Arc<dyn Backend>) -> Result<Salvage> {
        let superblock = superblock::read(&backend)?;
        let geometry = backend.geometry();
        if geometry.length.get() < superblock.data_start() {
            return Err(Error::Shrunk {
                place: backend.place(),
                want: ByteSize::new(superblock.length),
                have: geometry.length,
            });
        }
        let everything = 0..superblock.data_start();
        let place = backend.place();
        let medium = backend.map(everything, Access::Read, false)?;
        let log = Log::new(medium, superblock, place);
        let mut problems = Vec::new();
        match superblock::differing(&log)? {
            0 => {}
            n => problems.push(Problem::SuperblockCopy(n)),
        }
        let arenas = arenas(&log, &mut problems)?;
        let lost: Vec<_> = arenas.last().map(Arena::lost).unwrap_or_default();
        problems.extend(runs(&lost).into_iter().map(|run| {
            Problem::Lost(match run.end - run.start {
                1 => format!("entry {} of the log is lost", run.start),
                _ => format!(
                    "entries {} to {} of the log are lost",
                    run.start,
                    run.end - 1
                ),
            })
        }));
        let entries = arenas.iter().map(|arena| arena.entries.len() as u64).sum();
        Ok(Salvage {
            problems,
            entries,
            namespaces: namespaces(&arenas, superblock.data()),
        })
    }
}

/// The arenas that say what the pool holds, the later one last. Where no record is lost it is one.
fn arenas(log: &Log, problems: &mut Vec<Problem>) -> Result<Vec<Arena>> {
    let mut records = Vec::new();
    for host in (0..log.superblock.hosts).map(HostId) {
        match log.record(host.0) {
            Ok(record) => records.push(record),
            Err(Error::Corrupt { .. } | Error::Poisoned { .. }) => {
                problems.push(Problem::Lost(format!("the record of {host} is lost")));
            }
            Err(why) => return Err(why),
        }
    }
    let active = records.iter().filter(|it| it.state == HostState::Active);
    let current = active.max_by_key(|record| record.epoch);
    let mut of_record = Vec::new();
    if let Some(record) = current {
        let entries = read(log, record.host, record.turn % 2)?;
        let valid = entries.into_iter().filter(|(index, entry)| {
            (entry.epoch, entry.turn) == (record.epoch, record.turn)
                && entry.sequence == record.first_sequence.saturating_add(*index)
        });
        of_record.push(Arena {
            entries: valid.collect(),
            checkpoint: Some(record.checkpoint.into()),
        });
    }
    let lost = (0..log.superblock.hosts).filter(|host| records.iter().all(|it| it.host != *host));
    let later = lost.collect::<Vec<_>>().into_iter();
    let later = later.map(|host| latest(log, host, current));
    let later: Vec<_> = later.collect::<Result<_>>()?;
    // Of those whose record is lost one may have written later than the one that is active.
    let best = later.into_iter().flatten().max_by_key(|(epoch, _)| *epoch);
    Ok(best.map_or(of_record, |(_, arenas)| arenas))
}

/// The arenas of the highest epoch in which a host has written whose record is lost, if it is a later
/// one than that of the active record. The second of two may be half written: both are needed.
fn latest(log: &Log, host: u16, current: Option<&Record>) -> Result<Option<(u64, Vec<Arena>)>> {
    let both = [read(log, host, 0)?, read(log, host, 1)?];
    let all = both.iter().flat_map(BTreeMap::values);
    let Some(epoch) = all.map(|entry| entry.epoch).max() else {
        return Ok(None);
    };
    if current.is_some_and(|current| current.epoch >= epoch) {
        return Ok(None);
    }
    let mut turns = BTreeMap::new();
    for entries in both {
        let of_epoch = || entries.values().filter(|entry| entry.epoch == epoch);
        let Some(turn) = of_epoch().map(|entry| entry.turn).max() else {
            continue;
        };
        let arena = Arena {
            checkpoint: None,
            entries: entries
                .iter()
                .filter(|(_, entry)| (entry.epoch, entry.turn) == (epoch, turn))
                .map(|(index, entry)| (*index, entry.clone()))
                .collect(),
        };
        turns.insert(turn, arena);
    }
    Ok(Some((epoch, turns.into_values().collect())))
}

/// Every entry of an arena of which a half is whole, whenever it was written.
fn read(log: &Log, host: u16, turn: u64) -> Result<BTreeMap<u64, Entry>> {
    let mut entries = BTreeMap::new();
    let mut halves = [[0; HALF as usize]; 2];
    for index in 0..log.superblock.entries {
        let at = log.superblock.entry(host, turn, index);
        let step = crate::flush::Step::AcquireEntry;
        let loaded = log
            .medium
            .invalidate(at..at + ENTRY, step)
            .and_then(|()| log.medium.load(at, halves.as_flattened_mut()));
        match loaded {
            Ok(()) => {}
            Err(Error::Poisoned { .. }) => continue,
            Err(why) => return Err(why),
        }
        let mut found = halves.iter().filter_map(|it| Entry::decode(it, log.seed));
        if let Some(entry) = found.next() {
            entries.insert(index, entry);
        }
    }
    Ok(entries)
}

impl Arena {
    /// Entries that were there and cannot be read.
    fn lost(&self) -> Vec<u64> {
        let last = self.entries.keys().next_back().map_or(0, |last| last + 1);
        (0..last.max(self.checkpoint.unwrap_or(0)))
            .filter(|index| !self.entries.contains_key(index))
            .collect()
    }
}

/// Numbers that follow each other, as ranges.
fn runs(numbers: &[u64]) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for number in numbers {
        match runs.last_mut() {
            Some(run) if run.end == *number => run.end += 1,
            _ => runs.push(*number..number + 1),
        }
    }
    runs
}

/// What the entries name that can be read. One that contradicts an earlier one is right: what was lost
/// between them had made it possible.
fn namespaces(arenas: &[Arena], data: Range<u64>) -> Vec<Salvaged> {
    // By generation: name, extent, and whether nothing that may concern it was lost since.
    let mut found: BTreeMap<u64, (Box<str>, Extent, bool)> = BTreeMap::new();
    let possible = |extent: &Extent| {
        extent.length > 0
            && extent.offset.is_multiple_of(EXTENT)
            && extent.length.is_multiple_of(EXTENT)
            && data.start <= extent.offset
            && extent
                .offset
                .checked_add(extent.length)
                .is_some_and(|end| end <= data.end)
    };
    for arena in arenas {
        let lost: BTreeSet<_> = arena.lost().into_iter().collect();
        let checkpoint = arena.checkpoint.unwrap_or(0);
        let last = arena
            .entries
            .keys()
            .chain(&lost)
            .max()
            .map_or(0, |last| last + 1);
        for index in 0..last {
            let Some(entry) = arena.entries.get(&index) else {
                // A checkpoint takes nothing away.
                if index >= checkpoint {
                    found
                        .values_mut()
                        .for_each(|(_, _, certain)| *certain = false);
                }
                continue;
            };
            match &entry.operation {
                Operation::Create {
                    generation,
                    extent,
                    name,
                } => {
                    if bad_name(name).is_some() || !possible(extent) {
                        continue;
                    }
                    found.retain(|_, (other, at, _)| {
                        other != name && (at.end() <= extent.offset || extent.end() <= at.offset)
                    });
                    found.insert(*generation, (name.clone(), *extent, true));
                }
                Operation::Resize { generation, extent } if possible(extent) => {
                    if let Some((_, at, certain)) = found.get_mut(generation) {
                        (*at, *certain) = (*extent, true);
                    }
                }
                Operation::Remove { generation } => {
                    found.remove(generation);
                }
                _ => {}
            }
        }
    }
    let mut all: Vec<_> = found
        .into_iter()
        .map(|(generation, (name, extent, certain))| Salvaged {
            info: NamespaceInfo {
                name: name.into(),
                generation,
                offset: extent.offset,
                length: ByteSize::new(extent.length),
            },
            certain,
        })
        .collect();
    all.sort_by_key(|one| one.info.offset);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn create(generation: u64, place: u64, name: &str) -> Operation {
        let extent = Extent {
            offset: place * EXTENT,
            length: EXTENT,
        };
        Operation::Create {
            generation,
            extent,
            name: name.into(),
        }
    }

    fn found(checkpoint: Option<u64>, operations: &[Option<Operation>]) -> Vec<(String, bool)> {
        let entries = (0..).zip(operations).filter_map(|(index, operation)| {
            let entry = Entry {
                sequence: 1 + index,
                epoch: 1,
                turn: 1,
                operation: operation.clone()?,
            };
            Some((index, entry))
        });
        let arena = Arena {
            entries: entries.collect(),
            checkpoint,
        };
        let all = namespaces(&[arena], 4 * EXTENT..16 * EXTENT).into_iter();
        all.map(|one| (one.info.name, one.certain)).collect()
    }

    #[test]
    fn what_a_lost_entry_may_have_removed_is_not_certain() {
        let named = |all: &[(&str, bool)]| -> Vec<_> {
            let each = all.iter();
            each.map(|(name, certain)| ((*name).to_owned(), *certain))
                .collect()
        };
        let (a, b) = (create(1, 4, "a"), create(2, 5, "b"));
        let gone = Operation::Remove { generation: 1 };
        let all = [Some(a.clone()), Some(b.clone())];
        assert_eq!(found(Some(0), &all), named(&[("a", true), ("b", true)]));
        let all = [Some(a.clone()), None, Some(b.clone())];
        assert_eq!(found(Some(0), &all), named(&[("a", false), ("b", true)]));
        assert_eq!(found(None, &all), named(&[("a", false), ("b", true)]));
        // A checkpoint takes nothing away.
        assert_eq!(found(Some(3), &all), named(&[("a", true), ("b", true)]));
        // The last ones of a checkpoint may be lost as well.
        assert_eq!(found(Some(4), &all), named(&[("a", true), ("b", true)]));
        let all = [Some(a.clone()), None, Some(gone)];
        assert_eq!(found(Some(0), &all), []);
        // Its removal was lost, or it could not be where the other one is, or be called so.
        let all = [Some(a.clone()), None, Some(create(3, 4, "c"))];
        assert_eq!(found(Some(0), &all), named(&[("c", true)]));
        let all = [Some(a), None, Some(create(3, 7, "a"))];
        assert_eq!(found(Some(0), &all), named(&[("a", true)]));
        // Nothing outside, whatever an entry says.
        for place in [0, 3, 16, u64::MAX / EXTENT] {
            assert_eq!(found(Some(0), &[Some(create(1, place, "x"))]), []);
        }
    }

    #[test]
    fn numbers_are_told_as_ranges() {
        assert_eq!(runs(&[]), []);
        assert_eq!(runs(&[1, 2, 3, 7, 9, 10]), [1..4, 7..8, 9..11]);
    }
}
