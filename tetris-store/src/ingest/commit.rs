//! The end of an ingest: what is still missing, and the manifest that makes the model visible.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use carlsbad_types::ByteSize;

use super::work::{Fill, Work};
use super::{Ingest, Ingested, lock};
use crate::backing::{name, unnamed};
use crate::error::{Error, Result};
use crate::id::ModelId;
use crate::label;
use crate::lease::{begin_idle_time, mark_in_use};
use crate::lock::Lock;
use crate::manifest::{Manifest, TensorEntry};
use crate::publish::Claim;
use crate::regular;
use crate::root::readable;

impl Ingest<'_> {
    /// Waits for what others may be filling, and fills what they did not.
    pub(super) fn fill_what_is_missing(&self, works: &[Work]) -> Result<()> {
        for work in works {
            let (placed, fingerprint) = {
                let state = lock(&work.state);
                (state.placed.clone(), state.fingerprint)
            };
            let Some(placed) = placed.filter(|placed| placed.missing) else {
                continue;
            };
            let tmp = self.store.inner.root.tmp();
            let patience = self.store.inner.config.patience;
            let claim = match fingerprint {
                Some(fingerprint) => Claim::wait(&tmp, fingerprint, patience)?,
                None => Claim::wait(&tmp, placed.object, patience)?,
            };
            if claim.is_none() {
                tracing::warn!(object = %placed.object, ?patience, "no longer waiting for its filler");
            }
            if self.touch(&placed.object)? {
                if let Some(placed) = &mut lock(&work.state).placed {
                    placed.missing = false;
                }
                continue;
            }
            let fill = if work.packed {
                Fill::Write(Arc::new(self.store.inner.backing.begin()?), claim)
            } else {
                self.begin_single(work, claim)?
            };
            work.again(fill);
            self.run(&[work])?;
        }
        Ok(())
    }

    /// Makes the model visible, once everything it needs is there.
    pub(super) fn commit(&self, works: &[Work]) -> Result<Ingested> {
        let inner = &self.store.inner;
        let start = Instant::now();
        loop {
            // Anew each time: where a tensor had to be read again, its source may have changed.
            let manifest = self.manifest(works)?;
            let model = manifest.id(&inner.config.domain);
            let sweepless = inner.root.lock(Lock::Shared, inner.config.patience)?;
            let mut vanished = false;
            for work in works {
                if let Some(placed) = &mut lock(&work.state).placed {
                    // Nobody has leased the model yet, so a sweep may have taken it.
                    placed.missing = !inner.backing.contains(&placed.object)?;
                    vanished |= placed.missing;
                }
            }
            if !vanished {
                self.write_manifest(&model, &manifest)?;
                if let Some(label) = self.options.label {
                    label::set(&inner.root, label, &model)?;
                }
                drop(sweepless);
                return Ok(Ingested {
                    model,
                    tensors: manifest.tensors.len(),
                    bytes: manifest.byte_size(),
                    written: ByteSize::new(self.written.load(Ordering::Relaxed)),
                });
            }
            drop(sweepless);
            let waited = start.elapsed();
            if waited > inner.config.patience {
                let what = "being swept faster than it is filled (is keep_alive too short?)";
                return Err(Error::Busy {
                    what,
                    path: inner.root.path.clone(),
                    waited,
                });
            }
            self.fill_what_is_missing(works)?;
        }
    }

    fn write_manifest(&self, model: &ModelId, manifest: &Manifest) -> Result<()> {
        let path = self.store.inner.root.model(model);
        let failed = |error| Error::io("publish", &path)(error);
        // Ingested before: it counts as used now.
        let Some(before) = regular::open(&path)? else {
            let bytes = manifest.encode();
            let size = bytes.len() as u64;
            self.room.take(size, 0)?;
            let mut file = unnamed(&self.store.inner.root.models()).map_err(failed)?;
            file.write_all(&bytes).map_err(failed)?;
            readable(&file).map_err(failed)?;
            mark_in_use(&file, &path);
            // False: another ingest of the same was faster by a moment.
            self.room
                .settle(size, || name(&file, &path).map_err(failed))?;
            begin_idle_time(&path);
            return Ok(());
        };
        mark_in_use(&before, &path);
        begin_idle_time(&path);
        Ok(())
    }

    fn manifest(&self, works: &[Work]) -> Result<Manifest> {
        let declared = self.source.tensors();
        let mut tensors = Vec::with_capacity(declared.len());
        for work in works {
            let state = lock(&work.state);
            let Some(placed) = &state.placed else {
                continue;
            };
            let mut offset = placed.data;
            for (&index, &id) in work.tensors.iter().zip(&placed.ids) {
                let tensor = &declared[index];
                tensors.push(TensorEntry {
                    name: tensor.name.clone(),
                    element: tensor.element,
                    shape: tensor.shape.clone(),
                    id,
                    object: placed.object,
                    offset,
                    len: tensor.len,
                });
                offset += tensor.len;
            }
        }
        tensors.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        let mut sidecars = self.source.sidecars()?;
        sidecars.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        let twice = |what: &str, name: &str| Error::BadManifest {
            why: format!("two {what} are called {name:?}"),
        };
        if let Some(pair) = tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
            return Err(twice("tensors", &pair[0].name));
        }
        if let Some(pair) = sidecars
            .windows(2)
            .find(|pair| pair[0].name == pair[1].name)
        {
            return Err(twice("sidecars", &pair[0].name));
        }
        Ok(Manifest {
            format: self.source.format(),
            tensors,
            sidecars,
        })
    }
}
