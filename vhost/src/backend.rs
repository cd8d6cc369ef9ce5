//! The vhost-user messages of one session (vhost-user specification, "Front-end message types").
//!
//! State changes with the rings at rest: a message that alters memory, features or a ring's
//! addresses stops the rings concerned, waits until they have drained, and lets them go on.
//! A message refused with `ReqHandlerError` leaves the session going (the frontend hears of it
//! through REPLY_ACK); any other error ends it.

use std::fs::File;
use std::io;
use std::sync::Arc;

use sapwood_blockdev::device::BlockDevice;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Error, GpuBackend, Result, VhostUserBackendReqHandlerMut, VhostUserProtocolFeatures,
};

use crate::config::{self, CONFIG_BYTES, WRITEBACK_OFFSET};
use crate::features::{Features, protocol_offered};
use crate::guest::{GuestMap, Place, REGIONS_MAX, Region};
use crate::inflight::Inflight;
use crate::notify::{Kick, Notifier};
use crate::queue::{Ring, RingAddresses};
use crate::worker::{Start, Worker};

/// What the frontend has told about a ring.
#[derive(Default)]
struct Vring {
    size: u32,
    addresses: Option<RingAddresses>,
    /// Where the driver's requests go on.
    base: u16,
    /// Set: started (vhost-user "Ring states"); the inner option is the descriptor, if there is one.
    kick: Option<Option<Kick>>,
    call: Notifier,
    error: Notifier,
    enabled: bool,
    running: bool,
}

/// The backend of one session.
pub(crate) struct Backend<D> {
    device: Arc<D>,
    workers: Arc<[Worker]>,
    vrings: Vec<Vring>,
    map: GuestMap,
    features: Features,
    protocol: VhostUserProtocolFeatures,
    inflight: Option<Inflight>,
    writeback: bool,
}

/// Refuses a message without ending the session.
fn refuse(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::ReqHandlerError(io::Error::other(why))
}

impl<D: BlockDevice> Backend<D> {
    /// A session that knows nothing yet.
    pub(crate) fn new(device: Arc<D>, workers: Arc<[Worker]>) -> Self {
        let vrings = workers.iter().map(|_| Vring::default()).collect();
        let protocol = VhostUserProtocolFeatures::empty();
        let (map, features) = (GuestMap::default(), Features::default());
        let (inflight, writeback) = (None, true);
        let backend = Self { device, workers, vrings, map, features, protocol, inflight, writeback };
        // Before a driver has accepted FLUSH it cannot ask for durability.
        backend.apply_write_cache();
        backend
    }

    /// Whether the frontend takes notices of a changed configuration.
    pub(crate) fn takes_notices(&self) -> bool {
        self.protocol.contains(VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::BACKEND_REQ)
    }

    /// Stops all rings, at once, and waits until they have drained.
    pub(crate) fn stop_all(&mut self) {
        let stopping: Vec<_> = self
            .vrings
            .iter()
            .zip(&*self.workers)
            .map(|(vring, worker)| vring.running.then(|| worker.stop()))
            .collect();
        for (vring, stopping) in self.vrings.iter_mut().zip(stopping) {
            if let Some(stopping) = stopping {
                vring.running = false;
                vring.base = stopping.wait().unwrap_or(vring.base);
            }
        }
    }

    fn start_all(&mut self) {
        for index in 0..self.vrings.len() {
            self.start(index);
        }
    }

    /// Stops one ring and waits until it has drained.
    fn stop(&mut self, index: usize) {
        let vring = &mut self.vrings[index];
        if std::mem::take(&mut vring.running) {
            vring.base = self.workers[index].stop().wait().unwrap_or(vring.base);
        }
    }

    /// Lets a ring run if everything it needs is known. One that cannot run signals its error
    /// descriptor.
    fn start(&mut self, index: usize) {
        let vring = &mut self.vrings[index];
        let enabled = vring.enabled || !self.features.has(Features::PROTOCOL_FEATURES);
        let (Some(kick), Some(addresses)) = (&vring.kick, vring.addresses) else { return };
        if vring.running || !enabled {
            return;
        }
        let map = self.map.private_copy();
        let event_idx = self.features.has(Features::EVENT_IDX);
        let region = self.inflight.as_ref().and_then(|inflight| inflight.queue(index));
        let tracked = region.is_some();
        let started = Ring::new(&map, addresses, vring.size, vring.base, event_idx)
            .map_err(io::Error::other)
            .and_then(|mut ring| {
                if let Some(region) = region {
                    ring.track(region).map_err(|error| io::Error::other(format!("inflight: {error}")))?;
                }
                Ok(ring)
            })
            .and_then(|ring| {
                self.workers[index].start(Start {
                    ring,
                    map,
                    features: self.features,
                    kick: kick.clone(),
                    call: vring.call.clone(),
                    error: vring.error.clone(),
                })
            });
        match started {
            Ok(()) => {
                vring.running = true;
                if tracked {
                    // A predecessor may have died between publishing and signalling.
                    vring.call.signal();
                }
            }
            Err(error) => {
                log::error!("queue {index} cannot run: {error}");
                vring.error.signal();
            }
        }
    }

    /// The ring that a message is about.
    fn vring(&mut self, index: usize) -> Result<&mut Vring> {
        self.vrings.get_mut(index).ok_or(Error::InvalidParam)
    }

    /// Changes something about a ring while it rests.
    fn change(&mut self, index: usize, change: impl FnOnce(&mut Vring)) -> Result<()> {
        self.vring(index)?;
        self.stop(index);
        change(&mut self.vrings[index]);
        self.start(index);
        Ok(())
    }

    /// Changes guest memory while all rings rest.
    fn change_memory(&mut self, change: impl FnOnce(&mut GuestMap) -> Result<()>) -> Result<()> {
        self.stop_all();
        let changed = change(&mut self.map);
        self.start_all();
        changed
    }

    fn change_inflight(&mut self, inflight: Inflight) {
        self.stop_all();
        self.inflight = Some(inflight);
        self.start_all();
    }

    fn apply_write_cache(&self) {
        self.device.set_write_cache(self.features.write_cache(self.writeback));
    }
}

fn place(region: &VhostUserMemoryRegion) -> Place {
    Place { guest: region.guest_phys_addr, user: region.user_addr, len: region.memory_size }
}

fn unsupported<T>() -> Result<T> {
    Err(Error::InvalidOperation("not supported"))
}

impl<D: BlockDevice> VhostUserBackendReqHandlerMut for Backend<D> {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    /// Deprecated; means what RESET_DEVICE does.
    fn reset_owner(&mut self) -> Result<()> {
        self.reset_device()
    }

    /// Back to the state after connecting, except what belongs to the connection: the protocol
    /// features and the memory, which the frontend keeps its own account of. Nothing is in flight,
    /// and the rings begin anew.
    fn reset_device(&mut self) -> Result<()> {
        self.stop_all();
        self.inflight = None;
        self.vrings.fill_with(Vring::default);
        self.features = Features::default();
        self.writeback = true;
        self.apply_write_cache();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(Features::offered(self.device.geometry().read_only).0)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let offered = self.get_features()?;
        if features & !offered != 0 {
            return Err(refuse(format!("features {:#x} were not offered", features & !offered)));
        }
        if self.features != Features(features) {
            self.stop_all();
            self.features = Features(features);
            self.start_all();
        }
        self.apply_write_cache();
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let mut map = GuestMap::default();
        for (region, file) in regions.iter().zip(files) {
            let region = Region::map(place(region), file, region.mmap_offset).map_err(refuse)?;
            map.add(region).map_err(refuse)?;
        }
        self.change_memory(|old| {
            *old = map;
            Ok(())
        })?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        self.change(index as usize, |vring| vring.size = num)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let addresses = Some(RingAddresses { descriptors, available, used });
        if self.vring(index as usize)?.addresses == addresses {
            return Ok(());
        }
        self.change(index as usize, |vring| vring.addresses = addresses)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let vring = self.vring(index as usize)?;
        if vring.running {
            return Err(refuse("SET_VRING_BASE on a running ring"));
        }
        vring.base = u16::try_from(base).map_err(refuse)?;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.vring(index as usize)?;
        self.stop(index as usize);
        let vring = &mut self.vrings[index as usize];
        vring.kick = None;
        Ok(VhostUserVringState::new(index, vring.base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let kick = file.map(Kick::new).transpose().map_err(refuse)?;
        self.change(index.into(), |vring| vring.kick = Some(kick))
    }

    /// The queue goes on meanwhile: guests do this when they mask an interrupt. What finished
    /// while there was no descriptor is made up for by one signal too many.
    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let vring = self.vring(index.into())?;
        vring.call.set(file);
        if vring.running {
            vring.call.signal();
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.vring(index.into())?.error.set(file);
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(protocol_offered())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let features = VhostUserProtocolFeatures::from_bits(features)
            .filter(|features| protocol_offered().contains(*features))
            .ok_or_else(|| refuse(format!("protocol features {features:#x} were not all offered")))?;
        self.protocol = features;
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.vrings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        if self.vring(index as usize)?.enabled == enable {
            return Ok(());
        }
        self.change(index as usize, |vring| vring.enabled = enable)
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let space = config::space(&self.device.geometry(), self.vrings.len() as u16, self.writeback);
        let bytes = space.into_iter().chain(std::iter::repeat(0));
        // Both numbers were bounded by the message's own check (256 bytes).
        Ok(bytes.skip(offset as usize).take(size as usize).collect())
    }

    /// A driver may write `writeback` and nothing else (virtio 1.2, section 5.2.5.2).
    fn set_config(&mut self, offset: u32, bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        let only_writeback = offset as usize == WRITEBACK_OFFSET && bytes.len() == 1 && bytes[0] <= 1;
        if !only_writeback || !self.features.has(Features::CONFIG_WCE) {
            let end = offset as usize + bytes.len();
            return Err(refuse(format!(
                "configuration bytes {offset}..{end} of {CONFIG_BYTES} are read-only"
            )));
        }
        self.writeback = bytes[0] == 1;
        self.apply_write_cache();
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(REGIONS_MAX as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        let region = Region::map(place(region), file, region.mmap_offset).map_err(refuse)?;
        self.change_memory(|map| map.add(region).map_err(refuse))?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.change_memory(|map| map.remove(place(region)).map_err(refuse))
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        unsupported()
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        unsupported()
    }

    /// The frontend sends it back with SET_INFLIGHT_FD, at the latest to the next backend: what is
    /// in flight is kept in it from now on.
    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let made = Inflight::create(wanted.num_queues, wanted.queue_size, self.vrings.len());
        // There is no answer that says no, so the session ends.
        let (inflight, message, file) = made.map_err(|error| {
            log::warn!("GET_INFLIGHT_FD: {error}");
            Error::InvalidParam
        })?;
        self.change_inflight(inflight);
        Ok((message, file))
    }

    /// A region that cannot be used ends the session: without it requests would be lost silently.
    fn set_inflight_fd(&mut self, message: &VhostUserInflight, file: File) -> Result<()> {
        let inflight = Inflight::map(message, &file, self.vrings.len()).map_err(|error| {
            log::warn!("SET_INFLIGHT_FD: {error}");
            Error::InvalidParam
        })?;
        self.change_inflight(inflight);
        Ok(())
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        unsupported()
    }

    fn check_device_state(&mut self) -> Result<()> {
        unsupported()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        unsupported()
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        unsupported()
    }
}
