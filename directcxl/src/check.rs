//! Looking at everything a pool has, and mending what has a copy.

use std::collections::HashMap;
use std::fmt;
use std::sync::Weak;

use crate::backend::Health;
use crate::catalog::Catalog;
use crate::error::Result;
use crate::host::HostId;
use crate::layout::Lease;
use crate::lease::{self, Table};
use crate::log::State;
use crate::namespace::Inner;
use crate::pool::{PATIENCE, Pool, Shared, locked};
use crate::superblock;

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CheckReport {
    /// What was found wrong.
    pub problems: Vec<Problem>,
    /// Entries of the log that were read.
    pub entries: u64,
    /// Namespaces there are.
    pub namespaces: usize,
    /// Leases that hosts hold in their areas, by host. On one host the kernel has them.
    pub leases: Vec<usize>,
}

impl CheckReport {
    /// Whether nothing is wrong.
    pub fn is_ok(&self) -> bool {
        self.problems.is_empty()
    }
}

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Problem {
    /// So many copies of the superblock are damaged. The other one holds.
    SuperblockCopy(usize),
    /// So many copies of a host's record are damaged. The other one holds.
    RecordCopy(HostId, usize),
    /// A half of this entry of the log is damaged. The other one holds.
    EntryHalf(u64),
    /// So many leases of a host cannot be read: what is in quarantine stays there, until a process
    /// of that host opens the pool.
    Lease(HostId, usize),
    /// The head of a host's leases cannot be read.
    LeaseHead(HostId),
    /// Something is damaged that has no copy.
    Lost(String),
    /// The memory is gone, or has errors.
    Health(Health),
}

impl Problem {
    /// Whether nothing is lost.
    pub fn can_be_mended(&self) -> bool {
        !matches!(self, Self::Lost(_) | Self::Health(_))
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SuperblockCopy(n) => write!(f, "{n} copy of the superblock is damaged"),
            Self::RecordCopy(host, n) => write!(f, "{n} copy of the record of {host} is damaged"),
            Self::EntryHalf(i) => write!(f, "one half of entry {i} of the log is damaged"),
            Self::Lease(host, n) => write!(f, "{n} leases of {host} cannot be read"),
            Self::LeaseHead(host) => write!(f, "the head of the leases of {host} cannot be read"),
            Self::Lost(what) => f.write_str(what),
            Self::Health(Health::Removed) => f.write_str("the memory is gone"),
            Self::Health(Health::Poisoned(ranges)) => {
                f.write_str("the memory has errors at")?;
                for range in ranges {
                    write!(f, " {:#x}..{:#x}", range.start, range.end)?;
                }
                Ok(())
            }
            Self::Health(Health::Ok) => f.write_str("the memory is whole"),
        }
    }
}

impl Pool {
    /// Looks at every byte of the pool's own structures. Changes nothing.
    pub fn check(&self) -> CheckReport {
        let mut report = CheckReport::default();
        if let Err(why) = self.look(&mut report) {
            report.problems.push(Problem::Lost(why.to_string()));
        }
        match self.health() {
            Health::Ok => {}
            health => report.problems.push(Problem::Health(health)),
        }
        report
    }

    fn look(&self, report: &mut CheckReport) -> Result<()> {
        let log = &self.shared.log;
        let problems = &mut report.problems;
        match superblock::differing(log)? {
            0 => {}
            n => problems.push(Problem::SuperblockCopy(n)),
        }
        for host in (0..log.superblock.hosts).map(HostId) {
            match log.record_and_copies(host.0)?.differing {
                0 => {}
                n => problems.push(Problem::RecordCopy(host, n)),
            }
            let table = self.shared.table_of(host);
            if table.head()?.is_none() {
                problems.push(Problem::LeaseHead(host));
            }
            let slots = table.slots()?;
            let count = |kind: fn(&Lease) -> bool| slots.iter().filter(|slot| kind(slot)).count();
            match count(|slot| matches!(slot, Lease::Damaged)) {
                0 => {}
                n => problems.push(Problem::Lease(host, n)),
            }
            report
                .leases
                .push(count(|slot| matches!(slot, Lease::Of(_))));
        }
        let state = self.read_anew()?;
        problems.extend(state.damaged.iter().map(|i| Problem::EntryHalf(*i)));
        report.entries = state.position;
        report.namespaces = state.catalog.items().count();
        Ok(())
    }

    /// Reads the whole log, which finds what contradicts itself.
    fn read_anew(&self) -> Result<State> {
        let mut state = locked(&self.shared.state);
        *state = State::unread(&self.shared.log.superblock);
        self.shared.log.refresh(&mut state)?;
        Ok(state.clone())
    }

    /// Writes what is damaged from its copy; how much. Opening for writing does it. Another host's
    /// own structures are for that host to mend.
    ///
    /// # Errors
    /// Where something is damaged that has no copy, or another epoch writes.
    pub fn repair(&self) -> Result<usize> {
        self.shared.write(|writer| {
            let log = &writer.shared.log;
            let host = writer.shared.host.0;
            let mut mended = superblock::mend(log)?;
            let own = log.record_and_copies(host)?;
            if own.differing > 0 {
                log.write_record(&own.record)?;
                mended += own.differing;
            }
            if let Some(table) = writer.shared.own_table() {
                let shared = writer.shared;
                let attached = locked(&shared.attached);
                let _lock = lease::lock_table(shared.backend.as_fd(), PATIENCE)?;
                mended += shared.mend_leases(&table, &writer.state.catalog, &attached)?;
            }
            let damaged = std::mem::take(&mut writer.state.damaged);
            for index in damaged {
                if writer.state.record.host == host
                    && let Some(read) = log.read(&writer.state.record, index)?
                {
                    log.mend(&writer.state.record, index, &read)?;
                    mended += 1;
                }
            }
            if mended > 0 {
                tracing::warn!(mended, "damaged structures were written from their copies");
            }
            Ok(mended)
        })
    }
}

impl Shared {
    /// Writes the damaged leases of this host anew; how many. The table is locked.
    pub(crate) fn mend_leases(
        &self,
        table: &Table<'_>,
        catalog: &Catalog,
        attached: &HashMap<u64, Vec<Weak<Inner>>>,
    ) -> Result<usize> {
        let evicted = catalog.evicted(self.host.0);
        let nonce = evicted.map_or(1, |nonce| nonce.wrapping_add(1));
        table.mend(self.host, nonce, || {
            let items = catalog.items().map(|(generation, _)| generation);
            let gone = catalog.quarantine().map(|(generation, _)| generation);
            let mut held = Vec::new();
            for generation in items.chain(gone) {
                let here = attached.get(&generation).is_some_and(|all| !all.is_empty());
                if here || lease::is_attached_elsewhere(self.backend.as_fd(), generation)? {
                    held.push(generation);
                }
            }
            Ok(held)
        })
    }
}
