//! A virtio device as a function on the PCI bus (virtio 1.2, section 4.1.2): its identity, its capabilities, and
//! what lies where in the memory of its one BAR.

use std::ops::Range;
use std::sync::Arc;

use crate::interrupts::Events;
use crate::pci::Complaints;
use crate::pci::config::{ConfigSpace, Identity};
use crate::pci::msix::{self, CONTROL_ENABLE, CONTROL_MASK};
use crate::pci::root::Function;
use crate::virtio::transport::{COMMON_BYTES, Transport};

/// Bytes of a device's BAR.
pub const BAR_BYTES: u32 = 0x8000;

/// Vendor of virtio devices.
const VENDOR: u16 = 0x1af4;
/// Device number of a virtio device of type 0 (section 4.1.2.1).
const DEVICE: u16 = 0x1040;
/// Revision of a device that is not legacy.
const REVISION: u8 = 1;

/// Parts of the BAR, each with pages of its own.
const COMMON: Range<u64> = 0..0x1000;
const ISR: Range<u64> = 0x1000..0x2000;
const CONFIG: Range<u64> = 0x2000..0x3000;
const NOTIFY: Range<u64> = 0x3000..0x4000;
const TABLE: Range<u64> = 0x4000..0x6000;
const PENDING: Range<u64> = 0x6000..0x7000;

/// Queues that the parts have space for, their interrupts and that of the configuration included.
pub const QUEUES_MAX: u16 = 256;
/// Bytes between the notification addresses of two queues.
const NOTIFY_MULTIPLIER: u32 = 4;

/// A vendor-specific capability (section 4.1.4).
const CAPABILITY_VENDOR: u8 = 0x09;
/// Kinds of virtio capabilities.
const KIND_COMMON: u8 = 1;
const KIND_NOTIFY: u8 = 2;
const KIND_ISR: u8 = 3;
const KIND_CONFIG: u8 = 4;
const KIND_ACCESS: u8 = 5;
/// Bytes of a virtio capability.
const CAPABILITY_BYTES: u8 = 16;
/// Offsets in it.
const CAPABILITY_BAR: usize = 4;
const CAPABILITY_OFFSET: usize = 8;
const CAPABILITY_LENGTH: usize = 12;
/// Offset of the data of the access capability, and its size.
const ACCESS_DATA: usize = 16;
const ACCESS_BYTES: usize = 4;

const _: () = assert!(PENDING.end <= BAR_BYTES as u64);
const _: () = assert!(QUEUES_MAX as u64 * NOTIFY_MULTIPLIER as u64 <= NOTIFY.end - NOTIFY.start);
const _: () = assert!((QUEUES_MAX as u64 + 1) * msix::ENTRY_BYTES as u64 <= TABLE.end - TABLE.start);

/// A device on the bus.
pub struct VirtioFunction {
    space: ConfigSpace,
    transport: Transport,
    events: Arc<dyn Events>,
    /// Where the notification descriptors are connected.
    mapped: Option<u64>,
    /// Offsets of capabilities.
    msix_at: usize,
    access_at: usize,
    complaints: Complaints,
}

/// The body of a virtio capability, from behind the pointer to the next one.
fn capability(kind: u8, part: &Range<u64>, len: u64, more: &[u8]) -> Vec<u8> {
    let mut body = vec![CAPABILITY_BYTES + more.len() as u8, kind, 0, 0, 0, 0];
    body.extend((part.start as u32).to_le_bytes());
    body.extend((len as u32).to_le_bytes());
    body.extend(more);
    body
}

impl VirtioFunction {
    /// A device whose BAR is at an address, and on.
    ///
    /// # Panics
    /// More queues than [`QUEUES_MAX`]; a table of interrupts that is not one longer.
    pub fn new(transport: Transport, bar: u32, events: Arc<dyn Events>) -> Self {
        let device = transport.device();
        assert!((1..=QUEUES_MAX).contains(&device.queues), "queues that have space");
        let entries = transport.msix.len();
        assert!(
            entries == usize::from(device.queues) + 1,
            "an interrupt for each queue and the configuration"
        );
        let mut space = ConfigSpace::new(Identity {
            device: (VENDOR, DEVICE + device.kind),
            subsystem: (VENDOR, DEVICE + device.kind),
            revision: REVISION,
            class: device.class,
        });
        space.set_bar(bar, BAR_BYTES);

        let mut body = (entries as u16 - 1).to_le_bytes().to_vec();
        body.extend((TABLE.start as u32).to_le_bytes());
        body.extend((PENDING.start as u32).to_le_bytes());
        let msix_at = space.add_capability(msix::CAPABILITY_ID, &body);
        space.allow(msix_at + 2, &(CONTROL_ENABLE | CONTROL_MASK).to_le_bytes());

        let notify_bytes = u64::from(device.queues) * u64::from(NOTIFY_MULTIPLIER);
        for (kind, part, len, more) in [
            (KIND_COMMON, COMMON, COMMON_BYTES as u64, &[][..]),
            (KIND_NOTIFY, NOTIFY, notify_bytes, &NOTIFY_MULTIPLIER.to_le_bytes()),
            (KIND_ISR, ISR, 1, &[]),
            (KIND_CONFIG, CONFIG, CONFIG.end - CONFIG.start, &[]),
        ] {
            space.add_capability(CAPABILITY_VENDOR, &capability(kind, &part, len, more));
        }
        let access = capability(KIND_ACCESS, &(0..0), 0, &[0; ACCESS_BYTES]);
        let access_at = space.add_capability(CAPABILITY_VENDOR, &access);
        space.allow(access_at + CAPABILITY_BAR, &[0xff]);
        space.allow(access_at + CAPABILITY_OFFSET, &[0xff; 8]);

        let mut function = Self {
            space,
            transport,
            events,
            mapped: None,
            msix_at,
            access_at,
            complaints: Complaints::default(),
        };
        function.follow_bar();
        function
    }

    /// The registers.
    pub fn transport(&self) -> &Transport {
        &self.transport
    }

    /// Connects the notification descriptors where the BAR is now.
    fn follow_bar(&mut self) {
        let now = self.space.memory().map(|memory| memory.start + NOTIFY.start);
        if now == self.mapped {
            return;
        }
        for (start, connect) in [(self.mapped, false), (now, true)] {
            let Some(start) = start else { continue };
            for (queue, kick) in (0..).zip(self.transport.kicks()) {
                let address = start + queue * u64::from(NOTIFY_MULTIPLIER);
                // Two BARs at one place: the guest's doing. What is not connected comes by way of `write`.
                if let Err(error) = self.events.ioeventfd(kick, address, connect)
                    && let Some(n) = self.complaints.count()
                {
                    log::warn!("the notification of queue {queue} at {address:#x} (number {n}): {error}");
                }
            }
        }
        self.mapped = now;
    }

    /// The access that the capability for it describes (section 4.1.4.9), if it is one: offset and length.
    fn access(&self) -> Option<(u64, usize)> {
        let field = |offset: usize| self.space.u32_at(self.access_at + offset);
        let (bar, offset, len) =
            (field(CAPABILITY_BAR) as u8, field(CAPABILITY_OFFSET), field(CAPABILITY_LENGTH));
        let end = offset.checked_add(len)?;
        let fits = bar == 0 && matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len) && end <= BAR_BYTES;
        fits.then_some((offset.into(), len as usize))
    }

    /// Whether an access to the configuration space touches the access capability's data.
    fn touches_data(&self, offset: usize, len: usize) -> bool {
        let data = self.access_at + ACCESS_DATA;
        offset < data + ACCESS_BYTES && offset + len > data
    }
}

impl Function for VirtioFunction {
    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        if self.touches_data(offset, data.len())
            && let Some((at, len)) = self.access()
        {
            let mut bytes = [0; ACCESS_BYTES];
            self.read(at, &mut bytes[..len]);
            self.space.set(self.access_at + ACCESS_DATA, &bytes);
        }
        self.space.read(offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.space.write(offset, data);
        self.transport.msix.set_control(self.space.u16_at(self.msix_at + 2));
        self.follow_bar();
        let at_data = offset == self.access_at + ACCESS_DATA;
        if at_data
            && let Some((at, len)) = self.access()
            && data.len() == len
        {
            self.write(at, data);
        }
    }

    fn memory(&self) -> Option<Range<u64>> {
        self.space.memory()
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let within = |part: &Range<u64>| (offset - part.start) as usize;
        data.fill(0);
        match offset {
            _ if COMMON.contains(&offset) => self.transport.read_common(within(&COMMON), data),
            _ if offset == ISR.start => {
                if let Some(byte) = data.first_mut() {
                    *byte = self.transport.device().link.take_isr();
                }
            }
            _ if CONFIG.contains(&offset) => {
                self.transport.device().link.read_config(within(&CONFIG), data);
            }
            _ if TABLE.contains(&offset) => self.transport.msix.read_table(within(&TABLE), data),
            _ if PENDING.contains(&offset) => self.transport.msix.read_pending(within(&PENDING), data),
            _ => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let within = |part: &Range<u64>| (offset - part.start) as usize;
        match offset {
            _ if COMMON.contains(&offset) => self.transport.write_common(within(&COMMON), data),
            _ if CONFIG.contains(&offset) => self.transport.write_config(within(&CONFIG), data),
            _ if NOTIFY.contains(&offset) => {
                let (queue, rest) = (within(&NOTIFY) as u32 / NOTIFY_MULTIPLIER, offset % 4);
                if rest == 0 {
                    self.transport.notify(queue as usize);
                }
            }
            _ if TABLE.contains(&offset) => self.transport.msix.write_table(within(&TABLE), data),
            _ => {}
        }
    }
}
