//! Which pages of a guest go into its template's file.

use super::layout::PAGE;
use super::memory::GuestMemory;

/// Holes of up to this many pages of zeros are written as well: each piece is a mapping of every
/// clone.
const MOST_HOLE: u64 = 8;

/// Ranges of the memory, as offsets, that hold something other than zeros. Only for a guest whose
/// memory is its own: every page is looked at.
pub fn pages_with_something(memory: &GuestMemory) -> Vec<(u64, u64)> {
    let mut page = [0; PAGE as usize];
    let something = |at: &u64| {
        memory.read_offset(*at, &mut page);
        page.iter().any(|byte| *byte != 0)
    };
    let pages = (0..memory.len()).step_by(PAGE as usize).filter(something);
    join(pages)
}

/// Joins pages to ranges over small holes.
fn join(pages: impl Iterator<Item = u64>) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for page in pages {
        match ranges.last_mut() {
            Some(last) if page - last.1 <= MOST_HOLE * PAGE => last.1 = page + PAGE,
            _ => ranges.push((page, page + PAGE)),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::{MOST_HOLE, PAGE, join};

    #[test]
    fn small_holes_are_written_and_large_ones_are_not() {
        let far = (MOST_HOLE + 2) * PAGE;
        let pages = [0, PAGE, 3 * PAGE, 3 * PAGE + far];
        assert_eq!(
            join(pages.into_iter()),
            [(0, 4 * PAGE), (3 * PAGE + far, 4 * PAGE + far)]
        );
        assert_eq!(join(std::iter::empty()), []);
    }
}
