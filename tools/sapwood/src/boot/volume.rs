//! Disks that are volumes of stores: who serves them, and how a kernel on one is read.
//!
//! Where a daemon has the store, a volume is attached there, unless it is already, and given back when the machine has ended.
//! Otherwise its server opens the store, as that of a file opens the file.

use std::collections::BTreeSet;
use std::io;

use anyhow::{Context, bail};
use sapwood_vmm::from_disk::DiskReader;

use super::events::Interruption;
use super::plan::{DiskPlace, Machine};
use crate::host::Host;
use crate::volumes::access::Access;
use crate::volumes::address::Address;
use crate::volumes::live::{AttachVolume, DetachVolume, READ_BYTES_MAX, ReadVolume};
use crate::volumes::look::ShowVolume;

/// Volumes that were attached for a machine. Dropping it detaches them.
#[derive(Default)]
pub struct Leases(Vec<(Access, String)>);

impl Drop for Leases {
    fn drop(&mut self) {
        for (access, volume) in self.0.drain(..) {
            if let Err(error) = access.ask(DetachVolume { volume: volume.clone() }) {
                log::error!("{volume} stays attached: {error:#}");
            }
        }
    }
}

/// Finds out which disks of a machine are volumes, and attaches those whose store a daemon has; with `attach` false, they have to
/// be attached already.
pub fn settle(machine: &mut Machine, host: Host, attach: bool) -> anyhow::Result<Leases> {
    let mut leases = Leases::default();
    let mut alone = BTreeSet::new();
    for (index, disk) in machine.disks.iter_mut().enumerate() {
        let DiskPlace::File { path, format, read_only, control } = &disk.place else { continue };
        let Some(address) = Address::of_disk(path.as_os_str(), None)? else { continue };
        if format.is_some() || *read_only || control.is_some() {
            bail!("{}: a volume has none of format=, readonly and control=", path.display());
        }
        if index == 0 {
            machine.first_volume = Some(address.clone());
        }
        let (access, store) = (Access::to(host, &address.store)?, address.store.clone());
        let volume = address.volume()?;
        let found = access.ask(ShowVolume { volume: volume.clone() })?;
        if let Access::Direct(_) = access {
            // Each server would open the store, which one process can.
            if !alone.insert(store.canonicalize()?) {
                let daemon = format!("start sapwood daemon --store {}", store.display());
                bail!("{}: {daemon}: two volumes of one store need it", path.display());
            }
            continue;
        }
        let serving = match found.attached {
            Some(serving) if serving.frontend_connected => {
                bail!("{}: another virtual machine has it", path.display())
            }
            Some(serving) => serving,
            None if !attach => {
                bail!("{}: attach it first: the script is for later (sapwood attach)", path.display())
            }
            None => {
                let queues = Some(disk.queues(machine.cpus));
                let serving = access.ask(AttachVolume {
                    volume: volume.clone(),
                    socket: None,
                    queues,
                    map_cache: None,
                    // However this process ends.
                    transient: true,
                })?;
                leases.0.push((access, volume));
                serving
            }
        };
        disk.queues = Some(serving.queues);
        disk.place = DiskPlace::Socket(serving.socket);
    }
    Ok(leases)
}

/// A volume that is read for a kernel, in pieces, each by itself: nothing has it meanwhile.
pub struct VolumeReader {
    access: Access,
    volume: String,
    size: u64,
    /// The piece that was read last, and where it begins.
    piece: (u64, Vec<u8>),
    interruption: Interruption,
}

impl VolumeReader {
    /// Finds the volume.
    pub fn open(host: Host, address: Address, interruption: Interruption) -> anyhow::Result<Self> {
        let access = Access::to(host, &address.store)?;
        let volume = address.volume()?;
        let size = access.ask(ShowVolume { volume: volume.clone() })?.virtual_size;
        Ok(Self { access, volume, size, piece: (0, Vec::new()), interruption })
    }

    /// The piece that `offset` is in.
    fn load(&mut self, offset: u64) -> anyhow::Result<()> {
        let start = offset - offset % READ_BYTES_MAX;
        if self.piece.1.is_empty() || self.piece.0 != start {
            let length = READ_BYTES_MAX.min(self.size - start);
            let read = self.access.ask(ReadVolume { volume: self.volume.clone(), start, length })?;
            self.piece = (start, read.bytes().context("the daemon's answer makes no sense")?);
        }
        Ok(())
    }
}

impl DiskReader for VolumeReader {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if self.interruption.has_come() {
            return Err(io::Error::other("the search was interrupted"));
        }
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > self.size) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // Chunks do not cross pieces.
        self.load(offset).map_err(io::Error::other)?;
        let inside = (offset - self.piece.0) as usize;
        let found = self.piece.1.get(inside..inside + buf.len());
        buf.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}
