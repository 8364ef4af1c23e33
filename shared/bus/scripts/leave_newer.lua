-- Leave an entry of a version that the consumer cannot read to replicas that can. This delivery does not count.
-- KEYS: stream, index of the service's replicas
-- ARGV: consumer group, consumer, entry id, its version, prefix of lease keys, consumer that stands for newer replicas
-- Returns 'left', 'nobody' (no living replica reads that version) or 'lost'.
-- requires: entries
-- requires: newest_reader
if not owns(ARGV[3]) then return 'lost' end
if newest_reader(KEYS[2], ARGV[5]) < tonumber(ARGV[4]) then return 'nobody' end
local deliveries = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1)[1][4]
redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[6], 0, ARGV[3], 'RETRYCOUNT', math.max(deliveries - 1, 0), 'JUSTID')
return 'left'
