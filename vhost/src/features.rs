//! Feature bits: what is offered and what the driver accepted.

use vhost::vhost_user::VhostUserProtocolFeatures;

/// A set of virtio feature bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(pub u64);

impl Features {
    /// `VIRTIO_BLK_F_SIZE_MAX`: the configuration space bounds a segment's size.
    pub const SIZE_MAX: u64 = 1 << 1;
    /// `VIRTIO_BLK_F_SEG_MAX`: the configuration space bounds the segments of a request.
    pub const SEG_MAX: u64 = 1 << 2;
    /// `VIRTIO_BLK_F_RO`: writes are refused.
    pub const RO: u64 = 1 << 5;
    /// `VIRTIO_BLK_F_BLK_SIZE`: the logical block size is told.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// `VIRTIO_BLK_F_FLUSH`: the flush command.
    pub const FLUSH: u64 = 1 << 9;
    /// `VIRTIO_BLK_F_TOPOLOGY`: the physical block size is told.
    pub const TOPOLOGY: u64 = 1 << 10;
    /// `VIRTIO_BLK_F_CONFIG_WCE`: the driver may switch the write cache.
    pub const CONFIG_WCE: u64 = 1 << 11;
    /// `VIRTIO_BLK_F_MQ`: several queues.
    pub const MQ: u64 = 1 << 12;
    /// `VIRTIO_BLK_F_DISCARD`: the discard command.
    pub const DISCARD: u64 = 1 << 13;
    /// `VIRTIO_BLK_F_WRITE_ZEROES`: the write-zeroes command.
    pub const WRITE_ZEROES: u64 = 1 << 14;
    /// `VIRTIO_F_INDIRECT_DESC`: a descriptor may name a table of descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// `VIRTIO_F_EVENT_IDX`: either side says at which index it wants to be notified.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// `VHOST_USER_F_PROTOCOL_FEATURES`: the vhost-user protocol has features of its own.
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    /// `VIRTIO_F_VERSION_1`: not a legacy device. A driver that does not accept it is served all
    /// the same: requests of any layout are, and both sides are little-endian.
    pub const VERSION_1: u64 = 1 << 32;

    /// What a device offers (virtio 1.2, sections 5.2.3 and 6; vhost-user "Feature bits").
    pub fn offered(read_only: bool) -> Self {
        let always = Self::SIZE_MAX
            | Self::SEG_MAX
            | Self::BLK_SIZE
            | Self::FLUSH
            | Self::TOPOLOGY
            | Self::MQ
            | Self::INDIRECT_DESC
            | Self::EVENT_IDX
            | Self::PROTOCOL_FEATURES
            | Self::VERSION_1;
        let by_mode =
            if read_only { Self::RO } else { Self::CONFIG_WCE | Self::DISCARD | Self::WRITE_ZEROES };
        Self(always | by_mode)
    }

    /// Whether every bit of `bits` is in the set.
    pub fn has(self, bits: u64) -> bool {
        self.0 & bits == bits
    }

    /// Whether writes may be reported before they are durable: the driver must be able to flush,
    /// and the cache must not be switched off (virtio 1.2, sections 5.2.5.2 and 5.2.6.2).
    pub fn write_cache(self, writeback: bool) -> bool {
        self.has(Self::FLUSH) && (writeback || !self.has(Self::CONFIG_WCE))
    }
}

/// The vhost-user protocol features offered.
pub fn protocol_offered() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::RESET_DEVICE
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio_bindings::bindings::virtio_blk as blk;
    use virtio_bindings::bindings::virtio_config as common;
    use virtio_bindings::bindings::virtio_ring as ring;

    #[test]
    fn bits_are_those_of_the_kernel_headers() {
        for (ours, theirs) in [
            (Features::SIZE_MAX, blk::VIRTIO_BLK_F_SIZE_MAX),
            (Features::SEG_MAX, blk::VIRTIO_BLK_F_SEG_MAX),
            (Features::RO, blk::VIRTIO_BLK_F_RO),
            (Features::BLK_SIZE, blk::VIRTIO_BLK_F_BLK_SIZE),
            (Features::FLUSH, blk::VIRTIO_BLK_F_FLUSH),
            (Features::TOPOLOGY, blk::VIRTIO_BLK_F_TOPOLOGY),
            (Features::CONFIG_WCE, blk::VIRTIO_BLK_F_CONFIG_WCE),
            (Features::MQ, blk::VIRTIO_BLK_F_MQ),
            (Features::DISCARD, blk::VIRTIO_BLK_F_DISCARD),
            (Features::WRITE_ZEROES, blk::VIRTIO_BLK_F_WRITE_ZEROES),
            (Features::INDIRECT_DESC, ring::VIRTIO_RING_F_INDIRECT_DESC),
            (Features::EVENT_IDX, ring::VIRTIO_RING_F_EVENT_IDX),
            (Features::VERSION_1, common::VIRTIO_F_VERSION_1),
        ] {
            assert_eq!(ours, 1 << theirs);
        }
    }

    #[test]
    fn no_flush_means_write_through() {
        let all = Features::offered(false);
        assert!(all.write_cache(true));
        assert!(!all.write_cache(false));
        let no_switch = Features(all.0 & !Features::CONFIG_WCE);
        assert!(no_switch.write_cache(false), "the field has no meaning without CONFIG_WCE");
        assert!(!Features(all.0 & !Features::FLUSH).write_cache(true));
    }

    #[test]
    fn read_only_devices_offer_no_writes() {
        let features = Features::offered(true);
        assert!(features.has(Features::RO));
        assert_eq!(features.0 & (Features::DISCARD | Features::WRITE_ZEROES | Features::CONFIG_WCE), 0);
    }
}
