-- End an entry of `encode` whose request's prompt went ahead to `generate`: an engine answers the request. If the
-- embeddings cannot be made, its record says why. Nothing is written for a request that was sent back since, or is over.
-- KEYS: stream, record, quarantine
-- ARGV: consumer group, consumer, entry id, failure (empty: none), length of the quarantine, attempts, reason (empty: not
-- quarantined)
-- Returns 1 if that is so; 0 if the request is still to be ended, or the consumer does not own the entry.
-- requires: entries
-- requires: typed
if not owns(ARGV[3]) or not is_a('hash', KEYS[2]) then return 0 end
local ahead, encode, over = unpack(redis.call('HMGET', KEYS[2], 'ahead', 'encode', 'over'))
if ahead ~= ARGV[3] then return 0 end
if ARGV[4] ~= '' and encode and not over then redis.call('HSET', KEYS[2], 'failed', ARGV[4]) end
if ARGV[7] ~= '' then quarantine(ARGV[3], KEYS[3], ARGV[5], ARGV[7], ARGV[6]) end
ack(ARGV[3])
return 1
