//! The metadata server: node -> DC address, in a hash table that clients look up by one-sided READs
//! (section 4.1 of the paper; the table is that of DrTM-KV). Full buckets continue in an overflow
//! bucket, of which each has at most one: a look-up is one READ or two, never more.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use carlsbad_types::ByteSize;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::fabric::{DcAddress, Fabric, Port, Received, Sink};
use crate::message::Header;
use crate::node::{NodeId, Service};
use crate::region::{Access, MemoryRegion, RKey};

/// A node's id, and the 12 bytes of its DC address.
const ENTRY: usize = 20;
const HEADER: usize = 16;
/// Entries of a bucket, and of an overflow bucket.
const SLOTS: usize = 8;
const MORE: usize = 16;
/// Bytes of a bucket, and of an overflow bucket.
pub(crate) const BUCKET: usize = HEADER + SLOTS * ENTRY;
pub(crate) const OVERFLOW: usize = HEADER + MORE * ENTRY;
/// There is one overflow bucket for so many buckets. At a load factor of 0.75 (a mean of 6 in a
/// bucket of 8) 15% of the buckets overflow.
const SHARE: u64 = 4;
const KEY: RKey = RKey(1);

/// Messages for this service of a metadata server's node say where their sender is, as any message's
/// header does; their one byte is 1 where it has joined, and 0 where it leaves.
pub(crate) const REGISTER: Service = Service(0);

/// Where a metadata server's table is and how it is laid out: all that a node of another process needs
/// to read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetaTable {
    /// The server's node.
    pub node: NodeId,
    /// Where that is found. Another one after the server has been started again.
    pub address: DcAddress,
    /// The key of the table's region.
    pub key: RKey,
    /// Buckets of the table.
    pub buckets: u64,
}

impl MetaTable {
    fn hash(&self, node: NodeId) -> u64 {
        let mut x = node.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        // What another process describes may be nonsense.
        (x ^ (x >> 31)) % self.buckets.max(1)
    }

    pub(crate) fn bucket(&self, node: NodeId) -> u64 {
        self.hash(node).wrapping_mul(BUCKET as u64)
    }

    fn overflow_buckets(&self) -> u64 {
        self.buckets.div_ceil(SHARE) + 1
    }

    /// `None` for an index that no overflow bucket of this table has.
    pub(crate) fn overflow(&self, index: u32) -> Option<u64> {
        (u64::from(index) < self.overflow_buckets())
            .then(|| self.overflow_begin() + u64::from(index) * OVERFLOW as u64)
    }

    fn overflow_begin(&self) -> u64 {
        self.buckets.wrapping_mul(BUCKET as u64)
    }

    fn bytes(&self) -> u64 {
        self.overflow_begin() + self.overflow_buckets() * OVERFLOW as u64
    }
}

/// What a bucket says of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    Here(DcAddress),
    Nowhere,
    /// Not in this bucket, which continues in this overflow bucket.
    Further(u32),
    /// Read while it was written.
    Torn,
}

fn sum(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    words
        .iter()
        .chain([&last])
        .fold(0x4D45_5441, |sum: u64, word| {
            (sum ^ u64::from_le_bytes(*word))
                .wrapping_mul(0x9E37_79B9_7F4A_7C15)
                .rotate_left(31)
        })
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes
        .get(at..at + N)
        .and_then(|b| b.try_into().ok())
        .unwrap_or([0; N])
}

/// Looks for a node in the bytes of a bucket: `[sum][entries, overflow bucket + 1]` and the entries.
pub(crate) fn find(bytes: &[u8], node: NodeId) -> Found {
    if bytes.len() < HEADER {
        return Found::Torn;
    }
    // A bucket that was never written is all zeros.
    if bytes.iter().all(|b| *b == 0) {
        return Found::Nowhere;
    }
    if u64::from_le_bytes(number(bytes, 0)) != sum(&bytes[8..]) {
        return Found::Torn;
    }
    let entries = u32::from_le_bytes(number(bytes, 8)) as usize;
    let further = u32::from_le_bytes(number(bytes, 12));
    for entry in bytes[HEADER..].as_chunks::<ENTRY>().0.iter().take(entries) {
        if u64::from_le_bytes(number(entry, 0)) == node.0 {
            return Found::Here(DcAddress {
                number: u32::from_le_bytes(number(entry, 8)),
                key: u32::from_le_bytes(number(entry, 12)),
                lid: u16::from_le_bytes(number(entry, 16)),
                gid: u16::from_le_bytes(number(entry, 18)),
            });
        }
    }
    further
        .checked_sub(1)
        .map_or(Found::Nowhere, Found::Further)
}

fn encode(entries: &[(NodeId, DcAddress)], further: Option<u32>, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    bytes[8..12].copy_from_slice(&(entries.len() as u32).to_le_bytes());
    bytes[12..16].copy_from_slice(&further.map_or(0, |at| at + 1).to_le_bytes());
    for (to, (node, a)) in bytes[HEADER..].chunks_exact_mut(ENTRY).zip(entries) {
        to[..8].copy_from_slice(&node.0.to_le_bytes());
        to[8..12].copy_from_slice(&a.number.to_le_bytes());
        to[12..16].copy_from_slice(&a.key.to_le_bytes());
        to[16..18].copy_from_slice(&a.lid.to_le_bytes());
        to[18..20].copy_from_slice(&a.gid.to_le_bytes());
    }
    let check = sum(&bytes[8..]);
    bytes[..8].copy_from_slice(&check.to_le_bytes());
    bytes
}

/// What the table holds, to be written again from.
#[derive(Debug)]
struct Contents {
    buckets: Vec<Vec<(NodeId, DcAddress)>>,
    /// Which overflow bucket a bucket has.
    overflow: HashMap<u64, u32>,
    free: Vec<u32>,
}

/// The table, as it stands in the region and as it is written from.
#[derive(Debug)]
struct Store {
    /// Its address is of no meaning here.
    layout: MetaTable,
    region: Arc<MemoryRegion>,
    contents: Mutex<Contents>,
}

/// Nodes of other processes say by messages where they are.
impl Sink for Store {
    fn reserve(&self, service: Service) -> bool {
        service == REGISTER
    }

    fn release(&self, _service: Service) {}

    fn deliver(&self, received: Received) {
        let Some(header) = Header::decode(&received.header) else {
            return;
        };
        let (node, address) = (header.from, header.address);
        match received.body.as_slice() {
            [1] => {
                if let Err(why) = self.change(node, Some(address)) {
                    tracing::warn!(%node, %why, "a node cannot be found by others");
                }
            }
            // Not where another life of it has joined meanwhile.
            [0] if self.get(node) == Some(address) => {
                let _nothing_is_added = self.change(node, None);
            }
            _ => {}
        }
    }
}

/// A metadata server: a table on a node of its own. Nodes that are given several use them as
/// replicas, the first first.
#[derive(Debug)]
pub struct MetaServer {
    port: Arc<dyn Port>,
    table: MetaTable,
    store: Arc<Store>,
}

impl MetaServer {
    /// A server with room for `nodes` at a load factor of 0.75.
    ///
    /// # Errors
    /// Where the fabric has a node with this id, or there is no memory.
    pub fn new(fabric: &dyn Fabric, id: NodeId, nodes: usize) -> Result<Arc<Self>> {
        const MOST: usize = 1 << 24;
        if nodes == 0 || nodes > MOST {
            return Err(Error::OutOfRange {
                what: "the nodes of a table",
                given: nodes as u64,
                least: 1,
                most: MOST as u64,
            });
        }
        let buckets = (nodes * 4).div_ceil(3 * SLOTS);
        let mut table = MetaTable {
            node: id,
            address: DcAddress {
                number: 0,
                key: 0,
                lid: 0,
                gid: 0,
            },
            key: KEY,
            buckets: buckets as u64,
        };
        let size = ByteSize::new(table.bytes());
        let store = Arc::new(Store {
            layout: table,
            region: MemoryRegion::create(size, Access::Read, KEY, 0)?,
            contents: Mutex::new(Contents {
                buckets: vec![Vec::new(); buckets],
                overflow: HashMap::new(),
                free: (0..table.overflow_buckets() as u32).rev().collect(),
            }),
        });
        let port = fabric.join(id, Arc::clone(&store) as _)?;
        table.address = port.address();
        port.expose(&store.region)?;
        Ok(Arc::new(Self { port, table, store }))
    }

    /// What nodes of other processes need to use it: see [`Config::tables`](crate::Config::tables).
    pub fn table(&self) -> MetaTable {
        self.table
    }

    /// Bytes of the table.
    pub fn size(&self) -> ByteSize {
        ByteSize::new(self.table.bytes())
    }

    /// Says where a node is.
    ///
    /// # Errors
    /// [`Error::MetaFull`] where its bucket has no more room.
    pub fn insert(&self, node: NodeId, address: DcAddress) -> Result<()> {
        self.store.change(node, Some(address))
    }

    /// Forgets a node.
    pub fn remove(&self, node: NodeId) {
        let _nothing_is_added = self.store.change(node, None);
    }

    /// Takes the server off the fabric, as its death would: clients turn to the next replica.
    pub fn stop(&self) {
        self.port.leave();
    }
}

impl Store {
    fn get(&self, node: NodeId) -> Option<DcAddress> {
        let contents = self.contents.lock().unwrap_or_else(PoisonError::into_inner);
        let bucket = contents.buckets.get(self.layout.hash(node) as usize)?;
        let found = bucket.iter().find(|(one, _)| *one == node)?;
        Some(found.1)
    }

    fn change(&self, node: NodeId, address: Option<DcAddress>) -> Result<()> {
        let mut contents = self.contents.lock().unwrap_or_else(PoisonError::into_inner);
        let contents = &mut *contents;
        let hash = self.layout.hash(node);
        let bucket = &mut contents.buckets[hash as usize];
        let at = bucket.iter().position(|(one, _)| *one == node);
        match (at, address) {
            (Some(at), Some(address)) => bucket[at].1 = address,
            (Some(at), None) => {
                bucket.swap_remove(at);
            }
            (None, None) => return Ok(()),
            (None, Some(address)) => {
                let further = contents.overflow.contains_key(&hash);
                let room = bucket.len() < SLOTS
                    || bucket.len() < SLOTS + MORE && (further || !contents.free.is_empty());
                if !room {
                    return Err(Error::MetaFull(node));
                }
                bucket.push((node, address));
            }
        }
        if bucket.len() > SLOTS
            && !contents.overflow.contains_key(&hash)
            && let Some(free) = contents.free.pop()
        {
            contents.overflow.insert(hash, free);
        }
        let further = contents.overflow.get(&hash).copied();
        let (near, far) = bucket.split_at(bucket.len().min(SLOTS));
        let write_far = || {
            if let Some(at) = further.and_then(|index| self.layout.overflow(index)) {
                let _inside = self.region.write(at, &encode(far, None, OVERFLOW));
            }
        };
        let write_near = || {
            let continues = further.filter(|_| !far.is_empty());
            let bytes = encode(near, continues, BUCKET);
            let _inside = self.region.write(self.layout.bucket(node), &bytes);
        };
        // Where an entry moves between the two, it is in both for a while, and never in neither.
        if address.is_some() {
            write_far();
            write_near();
        } else {
            write_near();
            write_far();
        }
        if far.is_empty()
            && let Some(index) = contents.overflow.remove(&hash)
        {
            contents.free.push(index);
        }
        Ok(())
    }
}

impl Drop for MetaServer {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fabric::ShmFabric;

    fn at(number: u32) -> DcAddress {
        DcAddress {
            number,
            key: number ^ 7,
            lid: 3,
            gid: 1,
        }
    }

    #[test]
    fn a_bucket_says_what_it_was_made_of() {
        let entries: Vec<_> = (0..8).map(|n| (NodeId(n), at(n as u32))).collect();
        let bytes = encode(&entries, Some(5), BUCKET);
        assert_eq!(find(&bytes, NodeId(3)), Found::Here(at(3)));
        assert_eq!(find(&bytes, NodeId(9)), Found::Further(5));
        assert_eq!(find(&[0; BUCKET], NodeId(9)), Found::Nowhere);
    }

    #[test]
    fn a_torn_bucket_is_known_wherever_it_is_torn() {
        let old = encode(&[(NodeId(1), at(1)), (NodeId(2), at(2))], None, BUCKET);
        let new = encode(&[(NodeId(1), at(9)), (NodeId(3), at(3))], None, BUCKET);
        for cut in 1..BUCKET {
            let torn = [&new[..cut], &old[cut..]].concat();
            let whole = torn == old || torn == new;
            assert_eq!(
                find(&torn, NodeId(1)) == Found::Torn,
                !whole,
                "cut at {cut}"
            );
        }
    }

    fn look_up(server: &MetaServer, node: NodeId) -> (Found, usize) {
        let table = server.table();
        let read = |offset, len| {
            let mut bytes = vec![0; len];
            assert!(server.store.region.read(offset, &mut bytes));
            find(&bytes, node)
        };
        match read(table.bucket(node), BUCKET) {
            Found::Further(index) => (read(table.overflow(index).unwrap(), OVERFLOW), 2),
            found => (found, 1),
        }
    }

    #[test]
    fn full_tables_are_found_in_two_reads_and_come_back_empty() {
        let server = MetaServer::new(&ShmFabric::new(), NodeId(0), 10_000).unwrap();
        for node in 0..10_000 {
            server.insert(NodeId(node), at(node as u32)).unwrap();
        }
        let mut twice = 0;
        for node in 0..10_000 {
            let (found, reads) = look_up(&server, NodeId(node));
            assert_eq!(found, Found::Here(at(node as u32)));
            twice += usize::from(reads == 2);
        }
        assert!(twice > 0, "no bucket overflowed: the test shows nothing");
        assert_eq!(look_up(&server, NodeId(10_001)).0, Found::Nowhere);
        for node in 0..10_000 {
            server.remove(NodeId(node));
            assert_eq!(look_up(&server, NodeId(node)).0, Found::Nowhere);
        }
        let contents = server.store.contents.lock().unwrap();
        assert_eq!(
            contents.free.len(),
            server.table().overflow_buckets() as usize
        );
    }
}
