//! Memory that is fetched before it is read.

#![cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "a hint, which reads nothing"))]

use std::ops::Range;

/// What memory comes in.
const LINE_BYTES: usize = 64;

/// Fetches the line of `place`, wherever that is, into the second-level cache.
#[inline(always)]
fn fetch_line(place: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a hint alone, which reads nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(place.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = place;
}

/// Memory that is read next: it is fetched line by line, while there is something to compute.
#[derive(Debug)]
pub(super) struct Ahead<'a> {
    /// What is fetched at present.
    present: Range<*const u8>,
    /// What comes after it, but for so many bytes of the first.
    slices: &'a [&'a [f32]],
    skipped: usize,
    /// Bytes of all of it.
    bytes: usize,
    /// Bytes that a call of [`Ahead::fetch`] takes, and that were not taken yet.
    stride: usize,
    due: usize,
}

impl<'a> Ahead<'a> {
    /// As much as `values` are, behind them, and then part `index` of `count` of `slices`.
    pub(super) fn behind<T>(
        values: &[T],
        mut slices: &'a [&'a [f32]],
        [index, count]: [usize; 2],
    ) -> Self {
        let (start, bytes) = (values.as_ptr_range().end.cast::<u8>(), size_of_val(values));
        let part = slices.iter().map(|slice| size_of_val(*slice)).sum::<usize>() / count;
        let mut skipped = index * part;
        while let [first, rest @ ..] = slices
            && size_of_val(*first) <= skipped
        {
            skipped -= size_of_val(*first);
            slices = rest;
        }
        let present = start..start.wrapping_add(bytes);
        Self { present, slices, skipped, bytes: bytes + part, stride: 0, due: 0 }
    }

    /// That all of it is fetched in `calls` calls.
    pub(super) fn spread(&mut self, calls: usize) {
        self.stride = self.bytes / calls.max(1);
    }

    /// Fetches what is due.
    #[inline(always)]
    pub(super) fn fetch(&mut self) {
        self.due += self.stride;
        while self.due >= LINE_BYTES {
            self.due -= LINE_BYTES;
            let Some(line) = self.next_line() else { return };
            fetch_line(line);
        }
    }

    #[inline(always)]
    fn next_line(&mut self) -> Option<*const u8> {
        if self.present.start >= self.present.end {
            let [first, rest @ ..] = self.slices else { return None };
            let Range { start, end } = first.as_ptr_range();
            self.present = start.cast::<u8>().wrapping_add(self.skipped)..end.cast();
            (self.slices, self.skipped) = (rest, 0);
        }
        let line = self.present.start;
        self.present.start = line.wrapping_add(LINE_BYTES);
        Some(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_behind_comes_first_and_then_a_part_of_each_slice() {
        let (values, first, second) = ([0u8; 100], [0f32; 32], [0f32; 48]);
        let slices: [&[f32]; 2] = [&first, &second];
        let lines = |index, count| {
            let mut ahead = Ahead::behind(&values, &slices, [index, count]);
            std::iter::from_fn(|| ahead.next_line()).map(|line| line as usize).collect::<Vec<_>>()
        };
        let behind = values.as_ptr_range().end as usize;
        let [first, second] = slices.map(|slice| slice.as_ptr() as usize);
        let all = [behind, behind + 64, first, first + 64, second, second + 64, second + 128];
        assert_eq!(lines(0, 1), all);
        // A fifth is as long as a line.
        assert_eq!(lines(1, 5)[2..], all[3..]);
        assert_eq!(lines(3, 5)[2..], all[5..]);
    }

    #[test]
    fn all_of_it_is_due_after_as_many_calls_as_it_is_spread_over() {
        let (values, slice) = ([0u8; 6400], [0f32; 1600]);
        let slices: [&[f32]; 1] = [&slice];
        let mut ahead = Ahead::behind(&values, &slices, [0, 2]);
        ahead.spread(75);
        (0..75).for_each(|_| ahead.fetch());
        // The values behind are done, and half of the slice.
        let fetched = ahead.present.start as usize - slice.as_ptr() as usize;
        assert!((3200 - 2 * LINE_BYTES..=3200).contains(&fetched), "{fetched}");
    }
}
