-- Move an entry to the quarantine. A record is named if its request has said its last word in the tokens stream.
-- KEYS: stream, quarantine, record or none
-- ARGV: consumer group, consumer, entry id, length of the quarantine, attempts, reason
-- Returns 1 if the consumer owned the entry.
-- requires: entries
-- requires: typed
if not owns(ARGV[3]) then return 0 end
quarantine(ARGV[3], KEYS[2], ARGV[4], ARGV[6], ARGV[5])
ack(ARGV[3])
if KEYS[3] and is_a('hash', KEYS[3]) then redis.call('HSET', KEYS[3], 'over', '1') end
return 1
