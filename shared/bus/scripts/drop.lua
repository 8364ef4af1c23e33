-- End an entry, and delete its request's record.
-- KEYS: stream, record
-- ARGV: consumer group, consumer, entry id
-- Returns 1 if the consumer owned the entry.
-- requires: entries
-- requires: turns
if not owns(ARGV[3]) then return 0 end
ack(ARGV[3])
settle(KEYS[2])
redis.call('UNLINK', KEYS[2])
return 1
