-- Tell whether embeddings that a request lacks are still being made.
-- KEYS: record, encode
-- ARGV: none
-- Returns 'coming', 'gone', or the failure with which their making ended.
-- requires: typed
if not is_a('hash', KEYS[1]) or not is_a('stream', KEYS[2]) then return 'gone' end
local ahead, failed = unpack(redis.call('HMGET', KEYS[1], 'ahead', 'failed'))
if not ahead then return 'gone' end
if failed then return failed end
return #redis.call('XRANGE', KEYS[2], ahead, ahead) == 1 and 'coming' or 'gone'
