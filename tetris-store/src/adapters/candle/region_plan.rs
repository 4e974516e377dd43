//! Where each tensor of a model goes in its region: arithmetic only.

use std::alloc::Layout;
use std::collections::HashMap;

use crate::id::ObjectId;
use crate::manifest::TensorEntry;

use super::report::CopyReason;

/// Objects of at least this size begin at the same place within a huge page as their file does, so
/// that a tmpfs with huge pages can map them as such.
const HUGE_PAGE: usize = 2 << 20;

/// One stretch of an object file, and where in the region it is mapped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FileMap {
    pub(super) object: ObjectId,
    /// Where it begins in the file: a multiple of the page size.
    pub(super) file_offset: u64,
    /// Where it begins in the region: a multiple of the page size.
    pub(super) region_offset: usize,
    /// How many bytes of the file it takes in.
    pub(super) len: usize,
}

/// A region's layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RegionPlan {
    /// Address space that the region takes.
    pub(super) len: usize,
    /// The stretches, in the order of their places.
    pub(super) maps: Vec<FileMap>,
    /// For each entry, its place in the region, or why it has none.
    pub(super) places: Vec<Result<usize, CopyReason>>,
}

/// Tensors of one object that do not overlap, in the order of their offsets.
struct Stretch {
    end: u64,
    entries: Vec<usize>,
}

impl RegionPlan {
    /// Lays out `entries`, each in a block of its layout. Those without a layout get no place.
    ///
    /// Tensors that have bytes in common (tied weights) get mappings of their own: same pages, but
    /// a write to one must not show in the other, as it would not with candle's own loader.
    pub(super) fn new(entries: &[TensorEntry], page: usize, layouts: &[Option<Layout>]) -> Self {
        let mut places = vec![Err(CopyReason::Empty); entries.len()];
        let mut of_object: HashMap<ObjectId, Vec<usize>> = HashMap::with_capacity(entries.len());
        let mut objects = Vec::new();
        for (i, (entry, layout)) in entries.iter().zip(layouts).enumerate() {
            let Some(layout) = layout.filter(|layout| layout.size() > 0) else {
                continue;
            };
            if entry.offset % layout.align() as u64 != 0 {
                places[i] = Err(CopyReason::Unaligned);
                continue;
            }
            let of_this = of_object.entry(entry.object).or_insert_with(|| {
                objects.push(entry.object);
                Vec::new()
            });
            of_this.push(i);
        }

        let mut maps = Vec::with_capacity(objects.len());
        let mut len = 0usize;
        for object in objects {
            for stretch in stretches(entries, of_object.remove(&object).unwrap_or_default()) {
                let first = stretch.entries.first().map_or(0, |&i| entries[i].offset);
                let file_offset = first / page as u64 * page as u64;
                let bytes = (stretch.end - file_offset) as usize;
                let unit = if bytes >= HUGE_PAGE {
                    HUGE_PAGE.max(page)
                } else {
                    page
                };
                let within = (file_offset % unit as u64) as usize;
                let Some(region_offset) = next_congruent(len, unit, within).filter(|start| {
                    start
                        .checked_add(bytes)
                        .is_some_and(|end| end < usize::MAX / 2)
                }) else {
                    for i in stretch.entries {
                        places[i] = Err(CopyReason::NoVa);
                    }
                    continue;
                };
                for &i in &stretch.entries {
                    places[i] = Ok(region_offset + (entries[i].offset - file_offset) as usize);
                }
                len = (region_offset + bytes).next_multiple_of(page);
                maps.push(FileMap {
                    object,
                    file_offset,
                    region_offset,
                    len: bytes,
                });
            }
        }
        Self { len, maps, places }
    }
}

/// The least number from `from` on that leaves `rest` when divided by `unit`.
fn next_congruent(from: usize, unit: usize, rest: usize) -> Option<usize> {
    let start = from - from % unit + rest;
    if start >= from {
        Some(start)
    } else {
        start.checked_add(unit)
    }
}

/// Divides the entries of one object into as few stretches as their overlaps allow.
fn stretches(entries: &[TensorEntry], mut of_object: Vec<usize>) -> Vec<Stretch> {
    of_object.sort_by_key(|&i| (entries[i].offset, i));
    let mut all: Vec<Stretch> = Vec::with_capacity(1);
    for i in of_object {
        let end = entries[i].offset.saturating_add(entries[i].len);
        match all
            .iter_mut()
            .find(|stretch| stretch.end <= entries[i].offset)
        {
            Some(stretch) => {
                stretch.end = end;
                stretch.entries.push(i);
            }
            None => all.push(Stretch {
                end,
                entries: vec![i],
            }),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::element::ElementType;
    use crate::id::{Domain, TensorId};
    use carlsbad_types::{DType, Shape};
    use proptest::prelude::*;

    const PAGE: usize = 4096;

    fn object(number: u8) -> ObjectId {
        format!("{number:064x}").parse().unwrap()
    }

    fn entry(number: u8, dtype: DType, offset: u64, elements: usize) -> TensorEntry {
        let (element, shape) = (ElementType::Plain(dtype), Shape::from([elements]));
        TensorEntry {
            name: String::new(),
            element,
            id: TensorId::of(&Domain::default(), element, &shape, &[]),
            shape,
            object: object(number),
            offset,
            len: (elements * dtype.size()) as u64,
        }
    }

    fn plan(entries: &[TensorEntry]) -> RegionPlan {
        let layout = |entry: &TensorEntry| match entry.element {
            ElementType::Plain(dtype) => {
                Layout::from_size_align(entry.len as usize, dtype.size()).ok()
            }
            ElementType::Block(_) => None,
        };
        let layouts: Vec<_> = entries.iter().map(layout).collect();
        RegionPlan::new(entries, PAGE, &layouts)
    }

    #[test]
    fn a_pack_is_one_mapping_and_keeps_its_offsets() {
        let pack = [
            entry(1, DType::F32, 4096, 10),
            entry(1, DType::F16, 4136, 3),
            entry(1, DType::U8, 4142, 5000),
        ];
        let plan = plan(&pack);
        assert_eq!(plan.maps.len(), 1);
        assert_eq!(plan.maps[0].file_offset, 4096);
        assert_eq!(plan.maps[0].len, 40 + 6 + 5000);
        assert_eq!(plan.places, [Ok(0), Ok(40), Ok(46)]);
        assert_eq!(plan.len, 2 * PAGE);
    }

    #[test]
    fn empty_and_unaligned_tensors_are_told_apart() {
        let plan = plan(&[entry(1, DType::F32, 4096, 0), entry(1, DType::F32, 4098, 2)]);
        assert_eq!(
            plan.places,
            [Err(CopyReason::Empty), Err(CopyReason::Unaligned)]
        );
        assert_eq!((plan.len, plan.maps.len()), (0, 0));
    }

    #[test]
    fn tied_weights_get_mappings_of_their_own() {
        let tied = [entry(1, DType::F32, 4096, 8), entry(1, DType::F32, 4096, 8)];
        let plan = plan(&tied);
        assert_eq!(plan.maps.len(), 2);
        assert_eq!(plan.places, [Ok(0), Ok(PAGE)]);
    }

    #[test]
    fn large_objects_are_congruent_to_their_file_within_a_huge_page() {
        let plan = plan(&[
            entry(1, DType::U8, 4096, 100),
            entry(2, DType::U8, 4096, 3 << 20),
        ]);
        assert_eq!(plan.maps[1].region_offset % HUGE_PAGE, 4096);
    }

    #[test]
    fn hostile_sizes_are_refused_not_wrapped() {
        let huge = |number| TensorEntry {
            len: 1 << 62,
            ..entry(number, DType::U8, u64::MAX - 4095, 1)
        };
        let at_end = plan(&[huge(1)]);
        assert_eq!(
            at_end.maps[0].len, 4095,
            "cut where offsets end; no file is that long"
        );
        let huge = |number| TensorEntry {
            offset: 4096,
            ..huge(number)
        };
        assert_eq!(
            plan(&[huge(1), huge(2)]).places,
            [Ok(4096), Err(CopyReason::NoVa)]
        );
    }

    proptest! {
        #[test]
        fn no_two_tensors_share_an_address_and_each_lies_over_its_bytes(
            tensors in prop::collection::vec((0u8..4, 0usize..3, 0u64..30_000, 0usize..6_000), 0..40)
        ) {
            let dtypes = [DType::U8, DType::F16, DType::F64];
            let entries: Vec<_> = tensors
                .into_iter()
                .map(|(number, dtype, offset, elements)| entry(number, dtypes[dtype], offset, elements))
                .collect();
            let plan = plan(&entries);
            let mut taken = Vec::new();
            for (entry, place) in entries.iter().zip(&plan.places) {
                let Ok(place) = *place else { continue };
                let end = place + entry.len as usize;
                let map = plan.maps.iter().find(|map| {
                    map.region_offset <= place && end <= map.region_offset + map.len
                });
                let map = map.expect("inside a mapping");
                prop_assert_eq!(map.object, entry.object);
                let byte = map.file_offset + (place - map.region_offset) as u64;
                prop_assert_eq!(byte, entry.offset);
                prop_assert!(end <= plan.len);
                taken.push((place, end));
            }
            for map in &plan.maps {
                prop_assert_eq!(map.file_offset % PAGE as u64, 0);
                prop_assert_eq!(map.region_offset % PAGE, 0);
            }
            taken.sort();
            prop_assert!(taken.windows(2).all(|pair| pair[0].1 <= pair[1].0));
            let mut pages: Vec<_> = plan.maps.iter()
                .map(|map| (map.region_offset, (map.region_offset + map.len).next_multiple_of(PAGE)))
                .collect();
            pages.sort();
            prop_assert!(pages.windows(2).all(|pair| pair[0].1 <= pair[1].0));
        }
    }
}
