//! What a log says: the state of a pool after its entries. Pure: operations in, verdicts out.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::layout::{EXTENT, Extent, MOST_GENERATION, MOST_NAME, Operation};
use crate::space::Space;

/// A namespace as the log has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Item {
    pub(crate) name: Box<str>,
    pub(crate) extent: Extent,
}

/// The state of a pool. An operation that contradicts it is not applied.
#[derive(Debug, Clone)]
pub(crate) struct Catalog {
    names: BTreeMap<Box<str>, u64>,
    items: BTreeMap<u64, Item>,
    /// By offset: whose it was, and its length.
    quarantine: BTreeMap<u64, (u64, u64)>,
    /// Nonce of the leases of an evicted host.
    evicted: BTreeMap<u16, u64>,
    space: Space,
    quarantined: u64,
    next_generation: u64,
}

/// Why a name cannot be one, if it cannot.
pub(crate) fn bad_name(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        return Some("it is empty");
    }
    if name.len() > MOST_NAME {
        return Some("it is longer than 64 bytes");
    }
    let control = name.chars().any(char::is_control);
    control.then_some("it has a control character")
}

impl Catalog {
    /// Nothing in `data`.
    pub(crate) fn new(data: Range<u64>, next_generation: u64) -> Self {
        Self {
            names: BTreeMap::new(),
            items: BTreeMap::new(),
            quarantine: BTreeMap::new(),
            evicted: BTreeMap::new(),
            space: Space::new(data),
            quarantined: 0,
            next_generation: next_generation.max(1),
        }
    }

    pub(crate) fn by_name(&self, name: &str) -> Option<(u64, &Item)> {
        let generation = *self.names.get(name)?;
        Some((generation, self.items.get(&generation)?))
    }

    pub(crate) fn item(&self, generation: u64) -> Option<&Item> {
        self.items.get(&generation)
    }

    /// Namespaces, in the order in which they were made.
    pub(crate) fn items(&self) -> impl Iterator<Item = (u64, &Item)> {
        self.items
            .iter()
            .map(|(generation, item)| (*generation, item))
    }

    /// Extents in quarantine, with the generation that holds them there.
    pub(crate) fn quarantine(&self) -> impl Iterator<Item = (u64, Extent)> + '_ {
        self.quarantine
            .iter()
            .map(|(offset, (generation, length))| {
                let extent = Extent {
                    offset: *offset,
                    length: *length,
                };
                (*generation, extent)
            })
    }

    /// Whether just this extent is in quarantine under just this generation.
    pub(crate) fn is_quarantined(&self, generation: u64, extent: Extent) -> bool {
        self.quarantine.get(&extent.offset) == Some(&(generation, extent.length))
    }

    pub(crate) fn space(&self) -> &Space {
        &self.space
    }

    pub(crate) fn quarantined(&self) -> u64 {
        self.quarantined
    }

    pub(crate) fn next_generation(&self) -> u64 {
        self.next_generation
    }

    /// The nonce under which a host's leases do not count.
    pub(crate) fn evicted(&self, host: u16) -> Option<u64> {
        self.evicted.get(&host).copied()
    }

    /// Entries that a checkpoint of this state has.
    pub(crate) fn weight(&self) -> u64 {
        (self.items.len() + self.quarantine.len() + self.evicted.len()) as u64
    }

    /// Operations that make this state from nothing.
    pub(crate) fn checkpoint(&self) -> impl Iterator<Item = Operation> + '_ {
        let live = self.items().map(|(generation, item)| Operation::Create {
            generation,
            extent: item.extent,
            name: item.name.clone(),
        });
        let gone = self
            .quarantine()
            .map(|(generation, extent)| Operation::Quarantined { generation, extent });
        let evicted = self.evicted.iter().map(|(host, nonce)| Operation::Evict {
            host: *host,
            nonce: *nonce,
        });
        live.chain(gone).chain(evicted)
    }

    /// Applies what an entry says, or says what it contradicts.
    pub(crate) fn apply(&mut self, operation: &Operation) -> Result<(), &'static str> {
        match operation {
            Operation::Create {
                generation,
                extent,
                name,
            } => self.create(*generation, *extent, name),
            Operation::Remove { generation } => {
                let item = self
                    .items
                    .remove(generation)
                    .ok_or("it removes a namespace that is not there")?;
                self.names.remove(&item.name);
                self.hold(*generation, item.extent);
                Ok(())
            }
            Operation::Free { generation, extent } => {
                if !self.is_quarantined(*generation, *extent) {
                    return Err("it frees an extent that is not in quarantine");
                }
                self.quarantine.remove(&extent.offset);
                self.quarantined -= extent.length;
                if self.space.give(*extent) {
                    Ok(())
                } else {
                    Err("it frees an extent that is free")
                }
            }
            Operation::Resize { generation, extent } => self.resize(*generation, *extent),
            Operation::Quarantined { generation, extent } => {
                self.claim(*generation, *extent)?;
                self.hold(*generation, *extent);
                Ok(())
            }
            Operation::Evict { host, nonce } => {
                self.evicted.insert(*host, *nonce);
                Ok(())
            }
        }
    }

    fn create(&mut self, generation: u64, extent: Extent, name: &str) -> Result<(), &'static str> {
        if bad_name(name).is_some() {
            return Err("its name is none");
        }
        if self.names.contains_key(name) || self.items.contains_key(&generation) {
            return Err("it creates a namespace that is there");
        }
        self.claim(generation, extent)?;
        let name: Box<str> = name.into();
        self.names.insert(name.clone(), generation);
        self.items.insert(generation, Item { name, extent });
        Ok(())
    }

    fn resize(&mut self, generation: u64, extent: Extent) -> Result<(), &'static str> {
        let item = self
            .items
            .get_mut(&generation)
            .ok_or("it resizes a namespace that is not there")?;
        let old = item.extent;
        if extent.offset != old.offset
            || extent.length == 0
            || !extent.length.is_multiple_of(EXTENT)
        {
            return Err("it moves a namespace");
        }
        if extent.length > old.length {
            let more = Extent {
                offset: old.end(),
                length: extent.length - old.length,
            };
            if !self.space.take(more) {
                return Err("it overlaps another extent");
            }
        }
        item.extent = extent;
        if extent.length < old.length {
            let tail = Extent {
                offset: extent.end(),
                length: old.length - extent.length,
            };
            self.hold(generation, tail);
        }
        Ok(())
    }

    /// Takes an extent for a generation.
    fn claim(&mut self, generation: u64, extent: Extent) -> Result<(), &'static str> {
        if generation == 0 || generation >= MOST_GENERATION {
            return Err("its generation is none");
        }
        if !extent.offset.is_multiple_of(EXTENT) || !extent.length.is_multiple_of(EXTENT) {
            return Err("its extent is not aligned");
        }
        if !self.space.take(extent) {
            return Err("it overlaps another extent");
        }
        self.next_generation = self.next_generation.max(generation + 1);
        Ok(())
    }

    fn hold(&mut self, generation: u64, extent: Extent) {
        self.quarantine
            .insert(extent.offset, (generation, extent.length));
        self.quarantined += extent.length;
    }
}

#[cfg(test)]
mod tests {
    use super::Catalog;
    use crate::layout::{EXTENT, Extent, Operation};
    use proptest::prelude::*;

    fn data() -> std::ops::Range<u64> {
        4 * EXTENT..36 * EXTENT
    }

    fn operation() -> impl Strategy<Value = Operation> {
        let extent = (3u64..37, 0u64..6).prop_map(|(offset, length)| Extent {
            offset: offset * EXTENT,
            length: length * EXTENT,
        });
        (0u8..6, 1u64..9, extent, 0u8..6).prop_map(|(kind, generation, extent, name)| match kind {
            0 | 5 => Operation::Create {
                generation,
                extent,
                name: format!("n{name}").into(),
            },
            1 => Operation::Remove { generation },
            2 => Operation::Free { generation, extent },
            3 => Operation::Resize { generation, extent },
            _ => Operation::Quarantined { generation, extent },
        })
    }

    proptest! {
        /// Whatever a log says, nothing overlaps, nothing is lost, and a checkpoint says the same.
        #[test]
        fn extents_never_overlap_and_a_checkpoint_says_the_same(
            operations in prop::collection::vec(operation(), 1..120)
        ) {
            let mut catalog = Catalog::new(data(), 1);
            for operation in &operations {
                let _refused = catalog.apply(operation);
                let mut extents: Vec<_> = catalog.items().map(|(_, item)| item.extent)
                    .chain(catalog.quarantine().map(|(_, extent)| extent)).collect();
                extents.sort();
                for pair in extents.windows(2) {
                    prop_assert!(pair[0].end() <= pair[1].offset);
                }
                let used: u64 = extents.iter().map(|extent| extent.length).sum();
                prop_assert_eq!(used + catalog.space().free(), 32 * EXTENT);
                prop_assert!(extents.iter().all(|e| data().start <= e.offset && e.end() <= data().end));
            }
            let mut again = Catalog::new(data(), catalog.next_generation());
            for operation in catalog.checkpoint() {
                again.apply(&operation).unwrap();
            }
            prop_assert_eq!(catalog.items().collect::<Vec<_>>(), again.items().collect::<Vec<_>>());
            prop_assert_eq!(
                catalog.quarantine().collect::<Vec<_>>(),
                again.quarantine().collect::<Vec<_>>()
            );
            prop_assert_eq!(catalog.next_generation(), again.next_generation());
        }
    }
}
