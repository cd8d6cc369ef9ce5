//! Interrupts: file descriptors that raise lines of the I/O APIC or send messages (MSI), without a way through
//! this process (KVM_IRQFD, KVM_SET_GSI_ROUTING: Linux's Documentation/virt/kvm/api.rst).
//!
//! KVM numbers both by *GSI*. Those below [`IOAPIC_LINES`] are lines and keep the routes that KVM makes for them;
//! those above are messages, routed to whatever address and data the guest has given them.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KvmIrqRouting,
    kvm_irq_routing_entry,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::layout::IOAPIC_LINES;

/// Lines that the two interrupt controllers of a PC/AT have besides.
const PIC_LINES: u32 = 16;
/// Of which each has so many.
const PIC_LINES_EACH: u32 = 8;

/// KVM refused, or a descriptor could not be made.
#[derive(Debug, Error)]
#[error("{what}: {source}")]
pub struct Error {
    /// What was tried.
    what: &'static str,
    /// What the system said.
    #[source]
    source: io::Error,
}

/// The part of KVM that turns events of a guest into file descriptors and back; the seam for tests.
pub trait Events: Send + Sync {
    /// Connects a descriptor with an interrupt, or takes it off.
    ///
    /// # Errors
    /// What KVM says.
    fn irqfd(&self, event: &EventFd, gsi: u32, connect: bool) -> io::Result<()>;

    /// Makes a guest's writes of any width at an address of memory signal a descriptor, or no more.
    ///
    /// # Errors
    /// What KVM says.
    fn ioeventfd(&self, event: &EventFd, address: u64, connect: bool) -> io::Result<()>;

    /// Sets all routes of interrupts.
    ///
    /// # Errors
    /// What KVM says.
    fn set_routes(&self, routes: &[kvm_irq_routing_entry]) -> io::Result<()>;
}

impl Events for VmFd {
    fn irqfd(&self, event: &EventFd, gsi: u32, connect: bool) -> io::Result<()> {
        let done = if connect { self.register_irqfd(event, gsi) } else { self.unregister_irqfd(event, gsi) };
        Ok(done?)
    }

    fn ioeventfd(&self, event: &EventFd, address: u64, connect: bool) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        let done = if connect {
            self.register_ioevent(event, &address, NoDatamatch)
        } else {
            self.unregister_ioevent(event, &address, NoDatamatch)
        };
        Ok(done?)
    }

    fn set_routes(&self, routes: &[kvm_irq_routing_entry]) -> io::Result<()> {
        let routing = KvmIrqRouting::from_entries(routes)
            .map_err(|_| io::Error::other(format!("{} routes are too many", routes.len())))?;
        Ok(self.set_gsi_routing(&routing)?)
    }
}

/// What a message interrupt writes where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// The address: which processors.
    pub address: u64,
    /// The data: which vector.
    pub data: u32,
}

/// All interrupts of a machine.
#[derive(Clone)]
pub struct Interrupts {
    events: Arc<dyn Events>,
    state: Arc<Mutex<State>>,
}

struct State {
    /// The first GSI that nobody has.
    next: u32,
    /// Messages that have been given.
    messages: BTreeMap<u32, Message>,
}

/// A descriptor for an event that nobody waits for in read(2).
///
/// # Errors
/// What eventfd(2) says.
pub fn eventfd() -> io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

/// Whether a descriptor's event has happened and has not been taken.
fn has_happened(event: &EventFd) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(borrow(event), PollFlags::IN)];
    matches!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(1))
}

/// The descriptor, as the calls of rustix take it.
#[allow(unsafe_code)]
pub(crate) fn borrow(event: &EventFd) -> std::os::fd::BorrowedFd<'_> {
    use std::os::fd::{AsRawFd, BorrowedFd};
    // SAFETY: the descriptor is open for as long as the event that owns it is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

impl Interrupts {
    /// For a machine whose interrupt controllers have been made (KVM_CREATE_IRQCHIP).
    ///
    /// # Errors
    /// KVM refuses the routes.
    pub fn new(vm: Arc<VmFd>) -> Result<Self, Error> {
        Self::with(vm)
    }

    /// The same over anything that takes events.
    ///
    /// # Errors
    /// It refuses the routes.
    pub fn with(events: Arc<dyn Events>) -> Result<Self, Error> {
        let state = State { next: IOAPIC_LINES, messages: BTreeMap::new() };
        state.route(&*events)?;
        Ok(Self { events, state: Arc::new(Mutex::new(state)) })
    }

    /// A descriptor that raises a line of the I/O APIC for a moment (an edge) whenever it is written.
    ///
    /// # Errors
    /// No such line, or what the system says.
    pub fn line(&self, irq: u32) -> Result<EventFd, Error> {
        let what = "connecting an interrupt line";
        if irq >= IOAPIC_LINES {
            return Err(Error { what, source: io::Error::other(format!("there is no line {irq}")) });
        }
        let event = eventfd().map_err(|source| Error { what, source })?;
        self.events.irqfd(&event, irq, true).map_err(|source| Error { what, source })?;
        Ok(event)
    }

    /// A message interrupt, masked.
    ///
    /// # Errors
    /// The system has no descriptors left.
    pub fn vector(&self) -> Result<Vector, Error> {
        let event =
            eventfd().map_err(|source| Error { what: "making a descriptor for an interrupt", source })?;
        let mut state = self.lock();
        let gsi = state.next;
        state.next += 1;
        Ok(Vector { interrupts: self.clone(), event: Arc::new(event), gsi, connected: false })
    }

    /// Where descriptors are connected.
    pub fn events(&self) -> &Arc<dyn Events> {
        &self.events
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn route(&self, events: &dyn Events) -> Result<(), Error> {
        let mut routes = Vec::with_capacity(IOAPIC_LINES as usize * 2 + self.messages.len());
        for gsi in 0..IOAPIC_LINES {
            if gsi < PIC_LINES {
                let chip = KVM_IRQCHIP_PIC_MASTER + gsi / PIC_LINES_EACH;
                routes.push(to_chip(gsi, chip, gsi % PIC_LINES_EACH));
            }
            routes.push(to_chip(gsi, KVM_IRQCHIP_IOAPIC, gsi));
        }
        routes.extend(self.messages.iter().map(|(gsi, message)| to_message(*gsi, message)));
        events.set_routes(&routes).map_err(|source| Error { what: "routing interrupts", source })
    }
}

fn to_chip(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip.irqchip = irqchip;
    entry.u.irqchip.pin = pin;
    entry
}

fn to_message(gsi: u32, message: &Message) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi.address_lo = message.address as u32;
    entry.u.msi.address_hi = (message.address >> 32) as u32;
    entry.u.msi.data = message.data;
    entry
}

/// A message interrupt. While it is masked its descriptor is not connected, so that the descriptor keeps what
/// happens; when it is unmasked, KVM finds it there and delivers it.
pub struct Vector {
    interrupts: Interrupts,
    event: Arc<EventFd>,
    gsi: u32,
    connected: bool,
}

impl Vector {
    /// What to write to raise it.
    pub fn event(&self) -> &Arc<EventFd> {
        &self.event
    }

    /// Whether it has been raised while it was masked.
    pub fn is_pending(&self) -> bool {
        !self.connected && has_happened(&self.event)
    }

    /// Lets it through, as a message. Doing so again only changes the message.
    ///
    /// # Errors
    /// What KVM says; the state before holds.
    pub fn unmask(&mut self, message: Message) -> Result<(), Error> {
        {
            let mut state = self.interrupts.lock();
            if state.messages.get(&self.gsi) != Some(&message) {
                let before = state.messages.insert(self.gsi, message);
                if let Err(error) = state.route(&*self.interrupts.events) {
                    match before {
                        Some(before) => state.messages.insert(self.gsi, before),
                        None => state.messages.remove(&self.gsi),
                    };
                    return Err(error);
                }
            }
        }
        if !self.connected {
            let connected = self.interrupts.events.irqfd(&self.event, self.gsi, true);
            connected.map_err(|source| Error { what: "connecting an interrupt", source })?;
            self.connected = true;
        }
        Ok(())
    }

    /// Holds it back.
    ///
    /// # Errors
    /// What KVM says.
    pub fn mask(&mut self) -> Result<(), Error> {
        if self.connected {
            let taken_off = self.interrupts.events.irqfd(&self.event, self.gsi, false);
            taken_off.map_err(|source| Error { what: "taking off an interrupt", source })?;
            self.connected = false;
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod fake {
    //! Events that only remember what they were told.

    use super::*;
    use std::os::fd::AsRawFd;

    /// Remembers which descriptors are connected with what.
    #[derive(Default)]
    pub(crate) struct Remembered {
        /// Descriptors by GSI.
        pub(crate) irqfds: Mutex<BTreeMap<u32, i32>>,
        /// Descriptors by address.
        pub(crate) ioeventfds: Mutex<BTreeMap<u64, i32>>,
        /// Message routes: GSI, address and data.
        pub(crate) messages: Mutex<Vec<(u32, u64, u32)>>,
        /// Routes to the chips.
        pub(crate) lines: Mutex<usize>,
    }

    impl Remembered {
        fn change<K: Ord>(map: &Mutex<BTreeMap<K, i32>>, key: K, fd: i32, connect: bool) -> io::Result<()> {
            let mut map = map.lock().unwrap();
            if connect {
                if map.contains_key(&key) {
                    return Err(io::Error::from_raw_os_error(17));
                }
                map.insert(key, fd);
            } else if map.remove(&key) != Some(fd) {
                return Err(io::Error::from_raw_os_error(2));
            }
            Ok(())
        }
    }

    impl Events for Remembered {
        fn irqfd(&self, event: &EventFd, gsi: u32, connect: bool) -> io::Result<()> {
            Self::change(&self.irqfds, gsi, event.as_raw_fd(), connect)
        }

        fn ioeventfd(&self, event: &EventFd, address: u64, connect: bool) -> io::Result<()> {
            Self::change(&self.ioeventfds, address, event.as_raw_fd(), connect)
        }

        #[allow(unsafe_code)]
        fn set_routes(&self, routes: &[kvm_irq_routing_entry]) -> io::Result<()> {
            let (messages, lines): (Vec<&kvm_irq_routing_entry>, Vec<_>) =
                routes.iter().partition(|route| route.type_ == KVM_IRQ_ROUTING_MSI);
            *self.lines.lock().unwrap() = lines.len();
            *self.messages.lock().unwrap() = messages
                .iter()
                .map(|route| {
                    // SAFETY: the type says which member it is.
                    let msi = unsafe { route.u.msi };
                    (route.gsi, u64::from(msi.address_hi) << 32 | u64::from(msi.address_lo), msi.data)
                })
                .collect();
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::fake::Remembered;
    use super::*;

    #[test]
    fn a_masked_vector_keeps_what_happens() {
        let events = Arc::new(Remembered::default());
        let interrupts = Interrupts::with(events.clone()).unwrap();
        assert_eq!(*events.lines.lock().unwrap(), 40, "16 of them go to both kinds of controller");
        let mut vector = interrupts.vector().unwrap();
        assert!(!vector.is_pending());
        vector.event().write(1).unwrap();
        assert!(vector.is_pending());
        assert!(events.irqfds.lock().unwrap().is_empty());

        let message = Message { address: 0xfee0_1000, data: 0x41 };
        vector.unmask(message).unwrap();
        vector.unmask(message).unwrap();
        assert_eq!(events.irqfds.lock().unwrap().len(), 1);
        assert_eq!(*events.messages.lock().unwrap(), [(IOAPIC_LINES, 0xfee0_1000, 0x41)]);
        assert!(!vector.is_pending(), "it is KVM's now");
        vector.unmask(Message { data: 0x42, ..message }).unwrap();
        assert_eq!(*events.messages.lock().unwrap(), [(IOAPIC_LINES, 0xfee0_1000, 0x42)]);
        vector.mask().unwrap();
        vector.mask().unwrap();
        assert!(events.irqfds.lock().unwrap().is_empty());
    }

    #[test]
    fn lines_are_those_of_the_controller() {
        let interrupts = Interrupts::with(Arc::new(Remembered::default())).unwrap();
        interrupts.line(4).unwrap();
        assert!(interrupts.line(IOAPIC_LINES).is_err());
        let (first, second) = (interrupts.vector().unwrap(), interrupts.vector().unwrap());
        assert_ne!(first.gsi, second.gsi);
    }
}
