//! The guest's RAM: one file in memory, mapped here, given to KVM, and shared with the backends of the disks.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vm_memory::mmap::FromRangesError;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _};

use crate::layout::{RAM_HIGH_START, RAM_LOW_END};

/// The guest's RAM. Each region says where in the file it lies.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;

/// Less holds no kernel; the first MiB is for what the firmware would have left.
pub const RAM_BYTES_MIN: u64 = 4 << 20;
/// Enough for anyone, and addresses cannot overflow.
pub const RAM_BYTES_MAX: u64 = 1 << 40;
/// RAM is made of whole pages.
const PAGE_BYTES: u64 = 4096;

/// Why there is no memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size is not one that a machine can have.
    #[error(
        "a machine has {RAM_BYTES_MIN} to {RAM_BYTES_MAX} bytes of memory in pages of 4096 bytes, not {0}"
    )]
    Size(u64),
    /// The file that holds it.
    #[error("making a file of {0} bytes in memory: {1}")]
    File(u64, io::Error),
    /// Its mapping.
    #[error("mapping the guest's memory of {0} bytes: {1}")]
    Map(u64, FromRangesError),
    /// KVM did not take it.
    #[error("giving the guest its memory: {0}")]
    Kvm(kvm_ioctls::Error),
}

/// The stretches of RAM: first address and length.
pub fn ranges(bytes: u64) -> Vec<(u64, u64)> {
    let low = bytes.min(RAM_LOW_END);
    let mut ranges = vec![(0, low)];
    if bytes > low {
        ranges.push((RAM_HIGH_START, bytes - low));
    }
    ranges
}

/// Makes RAM of this many bytes. Nothing of it is in use until somebody touches it.
///
/// # Errors
/// The size is wrong, or the host cannot do it.
pub fn create(bytes: u64) -> Result<GuestMemory, MemoryError> {
    if !(RAM_BYTES_MIN..=RAM_BYTES_MAX).contains(&bytes) || !bytes.is_multiple_of(PAGE_BYTES) {
        return Err(MemoryError::Size(bytes));
    }
    let file = sealed_file(bytes).map_err(|error| MemoryError::File(bytes, error))?;
    let file = std::sync::Arc::new(file);
    let mut offset = 0;
    let ranges = ranges(bytes).into_iter().map(|(start, length)| {
        let place = FileOffset::from_arc(file.clone(), offset);
        offset += length;
        (GuestAddress(start), length as usize, Some(place))
    });
    GuestMemory::from_ranges_with_files(ranges).map_err(|error| MemoryError::Map(bytes, error))
}

/// A backend that maps the file must not be able to cut it off under us: that would be SIGBUS here.
fn sealed_file(bytes: u64) -> io::Result<File> {
    let file = memfd_create("guest-memory", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let file = File::from(file);
    file.set_len(bytes)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

/// Gives the RAM to a virtual machine, which must not outlive it.
///
/// # Errors
/// KVM refuses.
pub fn attach(vm: &VmFd, memory: &GuestMemory) -> Result<(), MemoryError> {
    for (slot, region) in memory.iter().enumerate() {
        let slot = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the region is mapped for as long as `memory` lives; regions do not overlap, and
        // each has a slot of its own. The caller keeps the memory as long as the machine.
        unsafe { vm.set_user_memory_region(slot) }.map_err(MemoryError::Kvm)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes as _;

    #[test]
    fn ram_goes_around_the_devices() {
        assert_eq!(ranges(4 << 20), [(0, 4 << 20)]);
        assert_eq!(ranges(RAM_LOW_END), [(0, RAM_LOW_END)]);
        assert_eq!(ranges(RAM_LOW_END + 4096), [(0, RAM_LOW_END), (1 << 32, 4096)]);
    }

    #[test]
    fn sizes_that_no_machine_has() {
        for bytes in [0, 4096, (4 << 20) + 1, RAM_BYTES_MAX + 4096, u64::MAX] {
            assert!(matches!(create(bytes), Err(MemoryError::Size(found)) if found == bytes));
        }
    }

    #[test]
    fn each_region_says_where_in_the_file_it_lies() {
        let memory = create(RAM_LOW_END + (1 << 20)).unwrap();
        let places: Vec<_> = memory.iter().map(|region| region.file_offset().unwrap().start()).collect();
        assert_eq!(places, [0, RAM_LOW_END]);
        memory.write_obj(7u8, GuestAddress(RAM_HIGH_START + 5)).unwrap();
        let file = memory.iter().nth(1).unwrap().file_offset().unwrap().arc().clone();
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_exact_at(&*file, &mut byte, RAM_LOW_END + 5).unwrap();
        assert_eq!(byte, [7]);
        assert!(file.set_len(4096).is_err(), "a backend could cut it off");
    }
}
