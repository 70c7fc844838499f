//! Memory for packed operands, kept by each thread from product to product.

use std::cell::Cell;

use memmap2::MmapMut;

use super::leaf::Lane;

/// A huge page. With small ones, the physical addresses of a panel are random and collide in the
/// second-level cache, which costs up to a third of a product's speed.
const HUGE: usize = 2 << 20;

thread_local! {
    static KEPT: Cell<[Buffer; 3]> = const { Cell::new([Buffer::EMPTY; 3]) };
}

/// Which of a thread's buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Slot {
    A,
    B,
    /// Values of an operand that is decoded before it is packed.
    Decoded,
}

/// Lanes that go back to their thread when dropped; what they hold is whatever was there.
///
/// They are taken out of the thread's keeping, not borrowed: a thread that waits for others may
/// begin another product meanwhile.
pub(super) struct Scratch {
    slot: Slot,
    buffer: Buffer,
}

impl Scratch {
    /// At least `lanes` of them, aligned to a huge page.
    pub(super) fn take(slot: Slot, lanes: usize) -> Self {
        let mut kept = KEPT.replace([Buffer::EMPTY; 3]);
        let mut buffer = std::mem::replace(&mut kept[slot as usize], Buffer::EMPTY);
        KEPT.set(kept);
        if buffer.lanes < lanes {
            buffer = Buffer::new(lanes);
        }
        Self { slot, buffer }
    }

    pub(super) fn as_mut_ptr(&mut self) -> *mut Lane {
        self.buffer.as_mut_ptr()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let buffer = std::mem::replace(&mut self.buffer, Buffer::EMPTY);
        // A thread that ends has given up its keeping; then the buffer is freed here.
        let _ = KEPT.try_with(|cell| {
            let mut kept = cell.replace([Buffer::EMPTY; 3]);
            let place = &mut kept[self.slot as usize];
            if place.lanes < buffer.lanes {
                *place = buffer;
            }
            cell.set(kept);
        });
    }
}

struct Buffer {
    map: Option<MmapMut>,
    lanes: usize,
}

impl Buffer {
    const EMPTY: Self = Self { map: None, lanes: 0 };

    /// # Panics
    /// When the system has no memory left, as any allocation.
    fn new(lanes: usize) -> Self {
        let bytes = (lanes * size_of::<Lane>()).next_multiple_of(HUGE);
        // One page more, so that an aligned range of this size lies inside.
        let map = MmapMut::map_anon(bytes + HUGE).expect("memory for the operands of a product");
        // A system that does not know the advice is only slower.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Self { map: Some(map), lanes: bytes / size_of::<Lane>() }
    }

    fn as_mut_ptr(&mut self) -> *mut Lane {
        let Some(map) = &mut self.map else { return std::ptr::null_mut() };
        let start = map.as_mut_ptr();
        start.wrapping_add(start.align_offset(HUGE)).cast()
    }
}
