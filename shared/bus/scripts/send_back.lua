-- Replace an entry of `generate` by the Encode that its record keeps.
-- KEYS: stream, record, encode
-- ARGV: consumer group, consumer, entry id, v, most returns of one request, id of the request
-- Returns 'done', 'lost' or 'never'.
-- requires: entries
if not owns(ARGV[3]) then return 'lost' end
local source = redis.call('HGET', KEYS[2], 'encode')
local returned = source and redis.pcall('HINCRBY', KEYS[2], 'returned', 1)
if type(returned) ~= 'number' or returned > tonumber(ARGV[5]) then return 'never' end
ack(ARGV[3])
redis.call('XADD', KEYS[3], '*', 'v', ARGV[4], 'm', source, 'r', ARGV[6])
return 'done'
