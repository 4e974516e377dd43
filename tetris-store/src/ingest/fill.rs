//! One stored file: whether it is written, its bytes, and its name once it is complete.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use carlsbad_types::ByteSize;
use nix::sys::resource::{Resource, getrlimit};

use super::work::{Fill, Placed, Work};
use super::{Ingest, lock};
use crate::error::{Error, Result};
use crate::hint::Fingerprint;
use crate::id::{ObjectId, TensorId};
use crate::object::{Member, SINGLE_DATA_OFFSET, header, single_header};
use crate::publish::Claim;
use crate::stamp;

impl Ingest<'_> {
    /// Decides whether a large tensor is written, if that has not been decided; the file to be
    /// written if so.
    pub(super) fn decide(&self, work: &Work) -> Result<Option<Arc<File>>> {
        let mut state = lock(&work.state);
        if matches!(state.fill, Fill::Undecided) {
            let index = work.tensors[0];
            let tensor = &self.source.tensors()[index];
            let fingerprint = Fingerprint::of(self.source, index, tensor)?;
            state.fingerprint = Some(fingerprint);
            state.fill = self.claim_if_new(work, fingerprint)?;
        }
        Ok(match &state.fill {
            Fill::Write(file, _) => Some(file.clone()),
            _ => None,
        })
    }

    fn claim_if_new(&self, work: &Work, fingerprint: Fingerprint) -> Result<Fill> {
        if self.may_be_stored(fingerprint)? {
            return Ok(Fill::HashOnly);
        }
        let Some(claim) = Claim::try_take(&self.store.inner.root.tmp(), fingerprint)? else {
            return Ok(Fill::HashOnly);
        };
        // Somebody may have finished it just before we got the claim.
        if self.may_be_stored(fingerprint)? {
            return Ok(Fill::HashOnly);
        }
        self.begin_single(work, Some(claim))
    }

    fn may_be_stored(&self, fingerprint: Fingerprint) -> Result<bool> {
        let inner = &self.store.inner;
        match inner.hints.get(fingerprint)? {
            Some(object) => inner.backing.contains(&object),
            None => Ok(false),
        }
    }

    pub(super) fn begin_single(&self, work: &Work, claim: Option<Claim>) -> Result<Fill> {
        self.make_room(SINGLE_DATA_OFFSET + work.len)?;
        let file = self.store.inner.backing.begin()?;
        // Known from the start, so that a tmpfs can give huge pages to what will fill them.
        file.set_len(SINGLE_DATA_OFFSET + work.len)
            .map_err(Error::io(
                "fill a tensor in",
                self.store.inner.root.objects(),
            ))?;
        file.write_all_at(&single_header(&self.member(work.tensors[0])), 0)
            .map_err(Error::io(
                "fill a tensor in",
                self.store.inner.root.objects(),
            ))?;
        Ok(Fill::Write(Arc::new(file), claim))
    }

    /// Room for a file of `size` bytes; more will be wanted for what is still to be read.
    fn make_room(&self, size: u64) -> Result<()> {
        // Writing beyond this limit would not fail but kill the process, by SIGXFSZ.
        let objects = self.store.inner.root.objects();
        let (limit, _) = getrlimit(Resource::RLIMIT_FSIZE)
            .map_err(Error::io("read the limit on file sizes for", &objects))?;
        if size > limit {
            return Err(Error::NoSpace {
                what: "store a tensor in",
                path: objects,
                why: format!("{size} bytes exceed RLIMIT_FSIZE, {limit} bytes"),
            });
        }
        let read = ByteSize::new(self.read.load(Ordering::Relaxed));
        self.room.take(size, self.total.saturating_sub(read).get())
    }

    fn member(&self, index: usize) -> Member {
        let tensor = &self.source.tensors()[index];
        Member {
            name: tensor.name.clone(),
            element: tensor.element,
            shape: tensor.shape.clone(),
            len: tensor.len,
        }
    }

    /// All pieces of a large tensor are read: what is it, and does the store have it now?
    pub(super) fn finish(&self, work: &Work) -> Result<()> {
        let inner = &self.store.inner;
        let tensor = &self.source.tensors()[work.tensors[0]];
        let mut state = lock(&work.state);
        let Some(content) = state.content.finish() else {
            // Another thread failed on a piece, and says so.
            return Ok(());
        };
        let id = TensorId::from_content(
            &inner.config.domain,
            tensor.element,
            &tensor.shape,
            &content,
        );
        let object = ObjectId::single(&id);
        let stored = match std::mem::replace(&mut state.fill, Fill::HashOnly) {
            Fill::Write(file, claim) => {
                self.publish(file, &object, work.len, SINGLE_DATA_OFFSET + work.len)?;
                if let Some(fingerprint) = state.fingerprint {
                    inner.hints.set(fingerprint, &object, &inner.root.tmp())?;
                }
                // Now that whoever waits for it finds the hint.
                drop(claim);
                true
            }
            Fill::Undecided | Fill::HashOnly => self.touch(&object)?,
        };
        state.placed = Some(Placed {
            object,
            data: SINGLE_DATA_OFFSET,
            ids: vec![id],
            missing: !stored,
        });
        Ok(())
    }

    fn publish(&self, file: Arc<File>, object: &ObjectId, len: u64, size: u64) -> Result<()> {
        // The other threads have dropped theirs, or are about to: they are done writing.
        let file = match Arc::try_unwrap(file) {
            Ok(file) => file,
            Err(file) => file
                .try_clone()
                .map_err(Error::io("publish", object.to_string()))?,
        };
        let now = stamp::now()?;
        let publish = || self.store.inner.backing.publish(file, object, now);
        if self.room.settle(size, publish)? {
            self.written.fetch_add(len, Ordering::Relaxed);
            lock(&self.published).push((*object, now));
        }
        Ok(())
    }

    /// Whether the store has `object`; if so it counts as used now.
    pub(super) fn touch(&self, object: &ObjectId) -> Result<bool> {
        self.store.inner.backing.touch(object, stamp::now()?)
    }

    /// Reads a pack's tensors into memory, and stores them if the store does not have them.
    pub(super) fn pack(&self, work: &Work) -> Result<()> {
        let inner = &self.store.inner;
        let members: Vec<_> = work.tensors.iter().map(|&i| self.member(i)).collect();
        let mut bytes = header(&members);
        let data = bytes.len();
        bytes.resize(data + work.len as usize, 0);
        let mut ids = Vec::with_capacity(members.len());
        let mut begin = data;
        for (&index, member) in work.tensors.iter().zip(&members) {
            let tensor = &mut bytes[begin..begin + member.len as usize];
            self.source.read_at(index, 0, tensor)?;
            ids.push(TensorId::of(
                &inner.config.domain,
                member.element,
                &member.shape,
                tensor,
            ));
            begin += member.len as usize;
        }
        let names = members.iter().map(|member| member.name.as_str());
        let object = ObjectId::pack(names.zip(&ids));

        let stored = self.touch(&object)? || self.write_pack(work, &object, &bytes)?;
        let data = data as u64;
        lock(&work.state).placed = Some(Placed {
            object,
            data,
            ids,
            missing: !stored,
        });
        Ok(())
    }

    /// Whether it was written; not where somebody else is at it.
    fn write_pack(&self, work: &Work, object: &ObjectId, bytes: &[u8]) -> Result<bool> {
        let inner = &self.store.inner;
        let size = bytes.len() as u64;
        let given = std::mem::replace(&mut lock(&work.state).fill, Fill::HashOnly);
        let (file, claim) = match given {
            Fill::Write(file, claim) => (file, claim),
            Fill::Undecided | Fill::HashOnly => {
                let Some(claim) = Claim::try_take(&inner.root.tmp(), object)? else {
                    return Ok(false);
                };
                if self.touch(object)? {
                    return Ok(true);
                }
                (Arc::new(inner.backing.begin()?), Some(claim))
            }
        };
        self.make_room(size)?;
        file.write_all_at(bytes, 0)
            .map_err(Error::io("fill a pack in", inner.root.objects()))?;
        self.publish(file, object, work.len, size)?;
        drop(claim);
        Ok(true)
    }
}
