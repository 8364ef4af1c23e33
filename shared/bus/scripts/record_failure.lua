-- Write the failure with which a request will end into its record.
-- KEYS: stream, record
-- ARGV: consumer group, consumer, entry id, failure (empty: none)
-- Returns 1 if the consumer owns the entry.
-- requires: entries
-- requires: typed
if not owns(ARGV[3]) then return 0 end
if ARGV[4] ~= '' and is_a('hash', KEYS[2]) then redis.call('HSET', KEYS[2], 'failed', ARGV[4]) end
return 1
